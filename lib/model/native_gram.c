/* A pair in the Gram form: products of its words with all patches, added up over the kept ones.
 *
 * Nothing is gathered: a list of kept patches leads through the products, the weights and the Gram
 * matrix, of which half is read.
 */
#include "native_pair.h"

#if LANES == 16
#define GROUP 8 /* rows of a sum; x WIDE vectors they leave registers for what is read */
#else
#define GROUP 4
#endif
#define WIDE 3

/* sum[i] += over the patches at[from..to) of rows[i][patch] x weights[patch]. */
FIXED void add_kept(const int R, const int W, const float *const *rows, const float *weights,
                    int64_t width, const int32_t *at, int64_t from, int64_t to,
                    lanes sum[GROUP][WIDE]) {
    const float *row[GROUP];
    UNROLLED for (int i = 0; i < R; i++) row[i] = rows[i];
    for (int64_t b = from; b < to; b++) {
        int64_t patch = at[b];
        lanes weight[WIDE];
        UNROLLED for (int w = 0; w < W; w++)
            weight[w] = *(const lanes *)(weights + patch * width + w * LANES);
        UNROLLED for (int i = 0; i < R; i++)
            UNROLLED for (int w = 0; w < W; w++) sum[i][w] += row[i][patch] * weight[w];
    }
}

typedef void Sum(const float *const *rows, const float *weights, int64_t width, const int32_t *at,
                 int64_t count, float *out);

#define CLEAR(R, W)                                                                               \
    lanes sum[GROUP][WIDE];                                                                       \
    UNROLLED for (int i = 0; i < R; i++)                                                          \
        UNROLLED for (int w = 0; w < W; w++) sum[i][w] = (lanes){0};

/* Sums of R rows of products over all `count` patches. */
#define WORDS(R, W)                                                                               \
    static void words_##R##_##W(const float *const *rows, const float *weights, int64_t width,    \
                                const int32_t *at, int64_t count, float *out) {                   \
        CLEAR(R, W)                                                                               \
        add_kept(R, W, rows, weights, width, at, 0, count, sum);                                  \
        UNROLLED for (int i = 0; i < R; i++) UNROLLED for (int w = 0; w < W; w++)                 \
            *(lanes *)(out + i * width + w * LANES) = sum[i][w];                                  \
    }

/* Add to out what R rows of the Gram matrix, those of at[0..R), and the rest right of them give. */
#define SQUARES(R, W)                                                                             \
    static void squares_##R##_##W(const float *const *rows, const float *weights, int64_t width,  \
                                  const int32_t *at, int64_t count, float *out) {                 \
        CLEAR(R, W)                                                                               \
        add_kept(R, W, rows, weights, width, at, R, count, sum);                                  \
        UNROLLED for (int i = 0; i < R; i++) UNROLLED for (int w = 0; w < W; w++)                 \
            sum[i][w] += sum[i][w]; /* what is right of the block counts twice */                 \
        add_kept(R, W, rows, weights, width, at, 0, R, sum);                                      \
        UNROLLED for (int i = 0; i < R; i++) UNROLLED for (int w = 0; w < W; w++)                 \
            *(lanes *)(out + w * LANES) +=                                                        \
                sum[i][w] * *(const lanes *)(weights + at[i] * width + w * LANES);                \
    }

#define KINDS(R)                                                                                  \
    WORDS(R, 1) WORDS(R, 2) WORDS(R, 3) SQUARES(R, 1) SQUARES(R, 2) SQUARES(R, 3)
#define SUMS(KIND, R) {KIND##_##R##_1, KIND##_##R##_2, KIND##_##R##_3}
KINDS(1) KINDS(2) KINDS(3) KINDS(4)
#if GROUP == 8
KINDS(5) KINDS(6) KINDS(7) KINDS(8)
#define TABLE(KIND)                                                                               \
    {SUMS(KIND, 1), SUMS(KIND, 2), SUMS(KIND, 3), SUMS(KIND, 4),                                  \
     SUMS(KIND, 5), SUMS(KIND, 6), SUMS(KIND, 7), SUMS(KIND, 8)}
#else
#define TABLE(KIND) {SUMS(KIND, 1), SUMS(KIND, 2), SUMS(KIND, 3), SUMS(KIND, 4)}
#endif
static Sum *const word_sums[GROUP][WIDE] = TABLE(words);
static Sum *const square_sums[GROUP][WIDE] = TABLE(squares);

/* All vectors of the weights, WIDE at a time. */
static void all_sums(Sum *const kinds[WIDE], const float *const *rows, const float *weights,
                     int64_t width, const int32_t *at, int64_t count, float *out) {
    int64_t vectors = width / LANES;
    for (int64_t part = 0; part < parts_of(vectors, WIDE); part++) {
        int64_t first = part_start(vectors, WIDE, part);
        int64_t now = part_start(vectors, WIDE, part + 1) - first;
        kinds[now - 1](rows, weights + first * LANES, width, at, count, out + first * LANES);
    }
}

/* w'Gw of each token over the kept patches. */
static void quadratic(const float *gram, int64_t n, const int32_t *kept, int64_t k,
                      const float *weights, int64_t width, float *squares) {
    memset(squares, 0, 4 * width);
    for (int64_t part = 0; part < parts_of(k, GROUP); part++) {
        int64_t first = part_start(k, GROUP, part), now = part_start(k, GROUP, part + 1) - first;
        const float *rows[GROUP];
        for (int64_t i = 0; i < now; i++) rows[i] = gram + (int64_t)kept[first + i] * n;
        all_sums(square_sums[now - 1], rows, weights, width, kept + first, k - first, squares);
    }
}

static float dot(const float *one, const float *other, int64_t n) {
    lanes sum = {0};
    int64_t l = 0;
    for (; l + LANES <= n; l += LANES)
        sum += *(const lanes *)(one + l) * *(const lanes *)(other + l);
    float rest = total(sum);
    for (; l < n; l++) rest += one[l] * other[l];
    return rest;
}

static float fused_norm(const Call *call, const float *gram, const Pair *pair) {
    int64_t n = call->patches, whole = n / LANES * LANES;
    lanes sum = {0};
    float rest = 0;
    for (int64_t d = 0; d < n - call->kept; d++) {
        const float *row = gram + (int64_t)pair->dropped[d] * n;
        float weight = pair->fused[pair->dropped[d]], tail = 0;
        lanes part = {0};
        for (int64_t l = 0; l < whole; l += LANES)
            part += *(const lanes *)(row + l) * *(const lanes *)(pair->fused + l);
        for (int64_t l = whole; l < n; l++) tail += row[l] * pair->fused[l];
        sum += weight * part, rest += weight * tail;
    }
    return inverse_norm(total(sum) + rest);
}

/* scale and offset, so that cosine = sum over patches x scale + product with the added x offset. */
static void scale_tokens(const Call *call, const Image *image, const Pair *pair) {
    int64_t k = call->kept, width = call->width;
    quadratic(image->gram, call->patches, pair->kept, k, image->peaks, width, pair->scale);
    memset(pair->offset, 0, 4 * width);
    for (int64_t b = 0; image->cross && b < k; b++) {
        int64_t row = pair->kept[b] * width;
        for (int64_t v = row; v < row + width; v += LANES)
            *(lanes *)(pair->offset + v - row) +=
                *(const lanes *)(image->cross + v) * *(const lanes *)(image->peaks + v);
    }
    for (int64_t j = 0; j < call->tokens; j++) {
        float share = pair->share[j], square = pair->scale[j] * share * share;
        if (image->cross) square += 2 * share * pair->offset[j] + image->squares[j];
        pair->offset[j] = inverse_norm(square);
        pair->scale[j] = share * pair->offset[j];
    }
}

/* The best of one word: `sums` are its tokens', `products` those with the sources. */
static float match_word(const Call *call, const Image *image, const Pair *pair, float *sums,
                        const float *products, float fused, float *for_tokens) {
    int64_t tokens = call->tokens, added = image->cross ? tokens : 0;
    const float *of_added = products + call->patches, *of_fixed = of_added + added;
    float best = drops(call) || !call->fused_counts ? NEVER : 0;
    for (int64_t j = 0; j < added; j++)
        sums[j] = sums[j] * pair->scale[j] + of_added[j] * pair->offset[j];
    for (int64_t j = added; j < tokens; j++) sums[j] *= pair->scale[j];
    for (int64_t j = 0; j < tokens; j++) {
        best = sums[j] > best ? sums[j] : best;
        for_tokens[j] = sums[j] > for_tokens[j] ? sums[j] : for_tokens[j];
    }
    if (drops(call)) {
        float cosine = fused * dot(products, pair->fused, call->patches);
        best = fmaxf(best, cosine);
        for_tokens[tokens] = fmaxf(for_tokens[tokens], cosine);
    }
    for (int64_t f = 0; f < call->fixed; f++) {
        for_tokens[tokens + 1 + f] = fmaxf(for_tokens[tokens + 1 + f], of_fixed[f]);
        if (image->fixed_mask[f]) best = fmaxf(best, of_fixed[f]);
    }
    return best;
}

/* Fill products (count, stride) of a packed tile of words with all sources. */
static void multiply_words(const Call *call, const Image *image, const float *words, int64_t count,
                           float *products, int64_t stride) {
    for (int64_t first = 0; first < call->sources; first += PANEL)
        tile_for(count, call->sources - first)(words, image->panels + first * call->channels,
                                               call->channels, products + first, stride, 0);
}

void match_gram(const Call *call, const Image *image, const Caption *caption, const Pair *pair,
                float *for_words, float *for_tokens) {
    int64_t width = call->width, stride = panels_of(call->sources) * PANEL;
    scale_tokens(call, image, pair);
    float fused = drops(call) ? fused_norm(call, image->gram, pair) : 0;
    for (int64_t j = 0; j < every_token(call); j++) for_tokens[j] = NEVER;
    if (!drops(call)) for_tokens[call->tokens] = 0;
    for (int64_t part = 0; part < parts_of(caption->count, ROWS); part++) {
        int64_t start = part_start(caption->count, ROWS, part);
        int64_t count = part_start(caption->count, ROWS, part + 1) - start;
        multiply_words(call, image, caption->words + start * call->channels, count, pair->products,
                       stride);
        for (int64_t piece = 0; piece < parts_of(count, GROUP); piece++) {
            int64_t first = part_start(count, GROUP, piece);
            int64_t now = part_start(count, GROUP, piece + 1) - first;
            const float *rows[GROUP];
            for (int64_t i = 0; i < now; i++) rows[i] = pair->products + (first + i) * stride;
            all_sums(word_sums[now - 1], rows, image->peaks, width, pair->kept, call->kept,
                     pair->cosines);
            for (int64_t i = 0; i < now; i++)
                for_words[caption->places[start + first + i]] = affinity(match_word(
                    call, image, pair, pair->cosines + i * width, rows[i], fused, for_tokens));
        }
    }
    for (int64_t j = 0; j < every_token(call); j++) for_tokens[j] = affinity(for_tokens[j]);
}
