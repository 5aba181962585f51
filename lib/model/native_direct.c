/* A pair in the direct form: its tokens are built of the kept patches, then multiplied by words.
 *
 * Long captions are scored so: to build the tokens costs the same whatever the words, and each word
 * then meets a fifth as many tokens as there are patches.
 */
#include "native_pair.h"

/* Build R tokens, a panel of their channels: weighted sums of kept patches, over their mass. */
FIXED void build(const int R, const float *weights, int64_t width, const float *patches,
                 const int32_t *at, int64_t count, const float *share, const float *added,
                 float *tokens, float *squares) {
    lanes sum[ROWS][VECTORS];
    UNROLLED for (int i = 0; i < R; i++)
        UNROLLED for (int w = 0; w < VECTORS; w++) sum[i][w] = (lanes){0};
    for (int64_t b = 0; b < count; b++) {
        int64_t patch = at[b];
        const float *weight = weights + patch * width;
        lanes row[VECTORS];
        UNROLLED for (int w = 0; w < VECTORS; w++)
            row[w] = *(const lanes *)(patches + patch * PANEL + w * LANES);
        UNROLLED for (int i = 0; i < R; i++)
            UNROLLED for (int w = 0; w < VECTORS; w++) sum[i][w] += weight[i] * row[w];
    }
    UNROLLED for (int i = 0; i < R; i++) UNROLLED for (int w = 0; w < VECTORS; w++) {
        lanes token = sum[i][w] * share[i];
        if (added) token += *(const lanes *)(added + i * PANEL + w * LANES);
        *(lanes *)(tokens + i * PANEL + w * LANES) = token;
        *(lanes *)(squares + i * LANES) += token * token;
    }
}

/* Multiply R tokens by a panel of words; keep each word's and each token's best cosine so far.
 *
 * `step` lies between panels of channels; `floor` is NEVER where there is no word, else 0; tokens
 * that `seen` does not mark are for no word.
 */
FIXED void meet(const int R, const int W, const float *tokens, int64_t step, int64_t panels,
                const float *words, const float *scale, const uint8_t *seen, const lanes *floor,
                lanes *for_words, float *for_tokens) {
    lanes sum[ROWS][VECTORS];
    UNROLLED for (int i = 0; i < R; i++)
        UNROLLED for (int w = 0; w < W; w++) sum[i][w] = (lanes){0};
    for (int64_t p = 0; p < panels; p++, tokens += step)
        for (int k = 0; k < PANEL; k++, words += PANEL) {
            lanes row[VECTORS];
            UNROLLED for (int w = 0; w < W; w++) row[w] = *(const lanes *)(words + w * LANES);
            UNROLLED for (int i = 0; i < R; i++)
                UNROLLED for (int w = 0; w < W; w++) sum[i][w] += tokens[i * PANEL + k] * row[w];
        }
    UNROLLED for (int i = 0; i < R; i++) {
        lanes *best = (lanes *)(for_tokens + i * LANES);
        UNROLLED for (int w = 0; w < W; w++) {
            lanes cosine = sum[i][w] * scale[i];
            if (seen[i]) for_words[w] = larger(for_words[w], cosine);
            *best = larger(*best, cosine + floor[w]);
        }
    }
}

typedef void Build(const float *weights, int64_t width, const float *patches, const int32_t *at,
                   int64_t count, const float *share, const float *added, float *tokens,
                   float *squares);
typedef void Meet(const float *tokens, int64_t step, int64_t panels, const float *words,
                  const float *scale, const uint8_t *seen, const lanes *floor, lanes *for_words,
                  float *for_tokens);

#define BUILD(R)                                                                                  \
    static void build_##R(const float *weights, int64_t width, const float *patches,              \
                          const int32_t *at, int64_t count, const float *share,                   \
                          const float *added, float *tokens, float *squares) {                    \
        build(R, weights, width, patches, at, count, share, added, tokens, squares);              \
    }
#define MEET(R, W)                                                                                \
    static void meet_##R##_##W(const float *tokens, int64_t step, int64_t panels,                 \
                               const float *words, const float *scale, const uint8_t *seen,       \
                               const lanes *floor, lanes *for_words, float *for_tokens) {         \
        meet(R, W, tokens, step, panels, words, scale, seen, floor, for_words, for_tokens);       \
    }
#define BOTH(R) BUILD(R) MEET(R, 1) MEET(R, 2)
#define MEETS(R) {meet_##R##_1, meet_##R##_2}
BOTH(1) BOTH(2) BOTH(3) BOTH(4) BOTH(5) BOTH(6)
#if ROWS == 14
BOTH(7) BOTH(8) BOTH(9) BOTH(10) BOTH(11) BOTH(12) BOTH(13) BOTH(14)
static Build *const builds[ROWS] = {build_1,  build_2,  build_3,  build_4, build_5,
                                    build_6,  build_7,  build_8,  build_9, build_10,
                                    build_11, build_12, build_13, build_14};
static Meet *const meets[ROWS][VECTORS] = {
    MEETS(1), MEETS(2), MEETS(3),  MEETS(4),  MEETS(5),  MEETS(6),  MEETS(7),
    MEETS(8), MEETS(9), MEETS(10), MEETS(11), MEETS(12), MEETS(13), MEETS(14)};
#else
static Build *const builds[ROWS] = {build_1, build_2, build_3, build_4, build_5, build_6};
static Meet *const meets[ROWS][VECTORS] = {MEETS(1), MEETS(2), MEETS(3),
                                           MEETS(4), MEETS(5), MEETS(6)};
#endif

static void build_tokens(const Call *call, const Image *image, const Pair *pair) {
    int64_t n = call->patches, tokens = call->tokens, every = every_token(call);
    for (int64_t p = 0; p < panels_of(call->channels); p++)
        for (int64_t part = 0; part < parts_of(tokens, ROWS); part++) {
            int64_t first = part_start(tokens, ROWS, part);
            int64_t now = part_start(tokens, ROWS, part + 1) - first;
            const float *added = image->added ? image->added + (p * tokens + first) * PANEL : NULL;
            builds[now - 1](image->peaks + first, call->width, image->channels + p * n * PANEL,
                            pair->kept, call->kept, pair->share + first, added,
                            pair->tokens + (p * every + first) * PANEL, pair->best + first * LANES);
        }
}

/* The weighted sum of the dropped patches: a single row, so several panels are summed at once. */
static void build_fused(const Call *call, const Image *image, const Pair *pair) {
    int64_t n = call->patches, every = every_token(call), panels = panels_of(call->channels);
    for (int64_t p = 0; p < panels; p += 4) {
        lanes sum[4][VECTORS] = {{{0}}};
        const float *start[4];
        UNROLLED for (int q = 0; q < 4; q++)
            start[q] = image->channels + (p + q < panels ? p + q : p) * n * PANEL;
        for (int64_t d = 0; d < n - call->kept; d++) {
            int64_t patch = pair->dropped[d];
            float weight = pair->fused[patch];
            UNROLLED for (int q = 0; q < 4; q++) UNROLLED for (int w = 0; w < VECTORS; w++)
                sum[q][w] += weight * *(const lanes *)(start[q] + patch * PANEL + w * LANES);
        }
        for (int q = 0; q < 4 && p + q < panels; q++)
            for (int w = 0; w < VECTORS; w++) {
                float *token = pair->tokens + ((p + q) * every + call->tokens) * PANEL;
                *(lanes *)(token + w * LANES) = sum[q][w];
                *(lanes *)(pair->best + call->tokens * LANES) += sum[q][w] * sum[q][w];
            }
    }
}

/* Copy the fixed tokens, which are of unit length, beside the others. */
static void place_fixed(const Call *call, const Image *image, const Pair *pair) {
    int64_t channels = call->channels, every = every_token(call);
    for (int64_t p = 0; call->fixed && p < panels_of(channels); p++)
        pack(image->fixed + p * PANEL, 1, channels, at_most(PANEL, channels - p * PANEL),
             call->fixed, PANEL, pair->tokens + ((p + 1) * every - call->fixed) * PANEL);
}

static void meet_words(const Call *call, const Caption *caption, const Pair *pair,
                       float *for_words) {
    int64_t every = every_token(call), panels = panels_of(call->channels);
    for (int64_t first = 0; first < caption->count; first += PANEL) {
        int64_t count = at_most(PANEL, caption->count - first);
        const float *words = caption->words + first * panels * PANEL;
        float floor[PANEL], best[PANEL];
        for (int64_t i = 0; i < PANEL; i++) best[i] = NEVER, floor[i] = i < count ? 0 : NEVER;
        for (int64_t part = 0; part < parts_of(every, ROWS); part++) {
            int64_t token = part_start(every, ROWS, part);
            int64_t now = part_start(every, ROWS, part + 1) - token;
            Meet *meet_tile = meets[now - 1][count > LANES];
            meet_tile(pair->tokens + token * PANEL, every * PANEL, panels, words,
                      pair->scale + token, pair->seen + token, (lanes *)floor, (lanes *)best,
                      pair->best + token * LANES);
        }
        for (int64_t i = 0; i < count; i++)
            for_words[caption->places[first + i]] = affinity(best[i]);
    }
}

void match_direct(const Call *call, const Image *image, const Caption *caption, const Pair *pair,
                  float *for_words, float *for_tokens) {
    int64_t tokens = call->tokens, every = every_token(call);
    memset(pair->best, 0, 4 * every * LANES);
    build_tokens(call, image, pair);
    if (drops(call))
        build_fused(call, image, pair);
    else
        for (int64_t p = 0; p < panels_of(call->channels); p++)
            memset(pair->tokens + (p * every + tokens) * PANEL, 0, 4 * PANEL);
    place_fixed(call, image, pair);
    for (int64_t j = 0; j < every; j++) {
        lanes *best = (lanes *)(pair->best + j * LANES);
        pair->scale[j] = j <= tokens ? inverse_norm(total(*best)) : 1;
        *best = (lanes){0} + NEVER;
        pair->seen[j] = j < tokens || (j == tokens ? drops(call) || call->fused_counts
                                                   : image->fixed_mask[j - tokens - 1]);
    }
    meet_words(call, caption, pair, for_words);
    for (int64_t j = 0; j < every; j++)
        for_tokens[j] = affinity(largest(*(lanes *)(pair->best + j * LANES)));
}
