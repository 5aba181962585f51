/* Best matches of image-caption pairs on the CPU: the numbers of kernels.py, a pair after another.
 *
 * Compiled at first use (native.py). Of a pair only the kept patches are read: their weights and
 * their part of the Gram matrix are packed once and stay in the first cache, half of the symmetric
 * Gram matrix is multiplied, and nothing but the maxima is written.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define LANES 8
#define TILE 4 /* rows multiplied at once */
typedef float lanes __attribute__((vector_size(4 * LANES), aligned(4)));

typedef struct {
    int64_t images, captions, patches, tokens, width, fixed, words, kept;
    int64_t stride;            /* between rows of products */
    int64_t sources;           /* products of an image: patches, added tokens, fixed tokens */
    const float *scores;       /* (images, captions, patches) */
    const float *peaks;        /* (images, patches, width): exp(logit - top), padded with zeros */
    const float *gram;         /* (images, patches, patches) */
    const float *cross;        /* (images, patches, width) with the added tokens, or NULL */
    const float *squares;      /* (images, tokens) of the added tokens */
    const float *products;     /* a row a real word, column image * sources + source */
    const int32_t *rows;       /* (captions, words): which row is a word's, -1 for padding */
    const uint8_t *fixed_mask; /* (images, fixed) */
    int64_t fused_counts;      /* whether words see the zero of a fused token that drops nothing */
    float *for_words;          /* (images, captions, words) */
    float *for_tokens;         /* (images, captions, tokens + 1 + fixed) */
} Call;

/* out[i][0..8w) = sum over b of coefficients[b][i] * rows[b][0..8w), for TILE i */
#define PRODUCT(NAME, W)                                                                          \
    static void NAME(const float *c, const float *rows, int64_t count, int64_t width, float *out) { \
        lanes sum[TILE][W];                                                                       \
        memset(sum, 0, sizeof sum);                                                               \
        for (int64_t b = 0; b < count; b++)                                                       \
            for (int w = 0; w < W; w++) {                                                         \
                lanes row = *(const lanes *)(rows + b * width + w * LANES);                       \
                for (int i = 0; i < TILE; i++) sum[i][w] += c[b * TILE + i] * row;                \
            }                                                                                     \
        for (int i = 0; i < TILE; i++)                                                            \
            for (int w = 0; w < W; w++) *(lanes *)(out + i * width + w * LANES) = sum[i][w];      \
    }
PRODUCT(product1, 1)
PRODUCT(product2, 2)
PRODUCT(product3, 3)

static void product(const float *c, const float *rows, int64_t count, int64_t width, float *out) {
    int64_t left = width / LANES;
    while (left > 0) {
        int64_t now = left == 4 ? 2 : left >= 3 ? 3 : left;
        (now == 3 ? product3 : now == 2 ? product2 : product1)(c, rows, count, width, out);
        rows += now * LANES, out += now * LANES, left -= now;
    }
}

/* Order: the k patches of the largest scores first, then the others; of ties the first are kept. */
static void choose(const float *scores, int64_t n, int64_t k, int32_t *keys, int32_t *order) {
    for (int64_t l = 0; l < n; l++) {
        int32_t bits;
        memcpy(&bits, scores + l, 4);
        if (bits == INT32_MIN) bits = 0; /* -0 equals 0 */
        keys[l] = bits < 0 ? bits ^ 0x7fffffff : bits; /* integers in the order of the floats */
    }
    int32_t reached = 0;
    for (int64_t l = 0; l < n; l++) reached += keys[l] >= 0;
    int32_t threshold = reached >= k ? 0 : INT32_MIN;
    for (int step = 30; step >= 0; step--) {
        int32_t candidate = threshold + (1 << step), enough = 0;
        for (int64_t l = 0; l < n; l++) enough += keys[l] >= candidate;
        if (enough >= k) threshold = candidate;
    }
    int64_t above = 0, kept = 0, dropped = k;
    for (int64_t l = 0; l < n; l++) above += keys[l] > threshold;
    int64_t room = k - above;
    for (int64_t l = 0; l < n; l++) {
        int tied = keys[l] == threshold && room > 0;
        room -= tied;
        if (keys[l] > threshold || tied)
            order[kept++] = (int32_t)l;
        else
            order[dropped++] = (int32_t)l;
    }
}

/* w'Gw of each token over the kept patches: TILE rows of G's upper triangle at once. */
static void quadratic(const float *gram, int64_t n, const int32_t *order, int64_t k,
                      const float *weights, int64_t width, float *packed, float *out,
                      float *squares) {
    memset(squares, 0, 4 * width);
    for (int64_t first = 0; first < k; first += TILE) {
        for (int i = 0; i < TILE; i++) {
            int64_t a = first + i;
            const float *row = gram + (int64_t)order[a < k ? a : k - 1] * n;
            for (int64_t b = first; b < k; b++) packed[(b - first) * TILE + i] = row[order[b]];
        }
        for (int i = 0; i < TILE; i++) { /* the diagonal counts once, what is right of it twice */
            for (int64_t b = 0; b < i && first + b < k; b++) packed[b * TILE + i] = 0;
            if (first + i < k) packed[i * TILE + i] *= 0.5f;
        }
        product(packed, weights + first * width, k - first, width, out);
        for (int64_t a = first; a < first + TILE && a < k; a++)
            for (int64_t j = 0; j < width; j++)
                squares[j] += 2 * out[(a - first) * width + j] * weights[a * width + j];
    }
}

static float affinity(float cosine) {
    cosine = cosine > 1 ? 1 : cosine < -1 ? -1 : cosine;
    return cosine > 0 ? cosine : 0.1f * cosine;
}

static float inverse_norm(float square) {
    return 1 / fmaxf(sqrtf(fmaxf(square, 0)), 1e-12f);
}

/* Weights of the dropped patches, zero where kept; returns the fused token's inverse norm. */
static float fuse(const Call *call, const float *gram, const float *scores, const int32_t *order,
                  float *weights) {
    int64_t n = call->patches, k = call->kept;
    float top = -3e38f, mass = 0, square = 0;
    memset(weights, 0, 4 * n);
    for (int64_t d = k; d < n; d++) top = fmaxf(top, scores[order[d]]);
    for (int64_t d = k; d < n; d++) mass += weights[order[d]] = expf(scores[order[d]] - top);
    for (int64_t l = 0; l < n; l++) weights[l] /= mass;
    for (int64_t d = k; d < n; d++) {
        const float *row = gram + (int64_t)order[d] * n;
        float sum = 0;
        for (int64_t l = 0; l < n; l++) sum += row[l] * weights[l];
        square += weights[order[d]] * sum;
    }
    return inverse_norm(square);
}

typedef struct {
    int32_t *keys, *order;
    float *weights, *packed, *out, *share, *norms, *offset, *fused;
} Scratch;

/* What a pair's tokens are: packed weights, one over mass, one over norm. */
static void prepare(const Call *call, int64_t image, const Scratch *s) {
    int64_t n = call->patches, k = call->kept, width = call->width;
    const float *peaks = call->peaks + image * n * width;
    memset(s->share, 0, 4 * width);
    memset(s->offset, 0, 4 * width);
    for (int64_t b = 0; b < k; b++) {
        const float *row = peaks + s->order[b] * width;
        float *weights = s->weights + b * width;
        for (int64_t j = 0; j < width; j++) s->share[j] += weights[j] = row[j];
    }
    quadratic(call->gram + image * n * n, n, s->order, k, s->weights, width, s->packed, s->out,
              s->norms);
    if (call->cross)
        for (int64_t b = 0; b < k; b++) {
            const float *row = call->cross + (image * n + s->order[b]) * width;
            for (int64_t j = 0; j < width; j++) s->offset[j] += row[j] * s->weights[b * width + j];
        }
    for (int64_t j = 0; j < call->tokens; j++) {
        float share = s->share[j] = 1 / fmaxf(s->share[j], 1e-38f);
        float square = s->norms[j] * share * share;
        if (call->cross)
            square += 2 * share * s->offset[j] + call->squares[image * call->tokens + j];
        s->norms[j] = inverse_norm(square);
    }
}

static void match(const Call *call, int64_t image, int64_t caption, const Scratch *s) {
    int64_t n = call->patches, k = call->kept, width = call->width, tokens = call->tokens;
    int64_t pair = image * call->captions + caption, drops = k < n;
    int64_t added = call->cross ? tokens : 0, every = tokens + 1 + call->fixed;
    const float *scores = call->scores + pair * n;
    const int32_t *word_rows = call->rows + caption * call->words;
    float *for_words = call->for_words + pair * call->words;
    float *for_tokens = call->for_tokens + pair * every;
    choose(scores, n, k, s->keys, s->order);
    prepare(call, image, s);
    float fused = drops ? fuse(call, call->gram + image * n * n, scores, s->order, s->fused) : 0;
    for (int64_t j = 0; j < every; j++) for_tokens[j] = -3e38f;
    if (!drops) for_tokens[tokens] = 0;
    for (int64_t next = 0; next < call->words;) {
        const float *rows[TILE];
        int64_t words[TILE], real = 0;
        for (; next < call->words && real < TILE; next++) {
            for_words[next] = 0;
            if (word_rows[next] < 0) continue;
            words[real] = next;
            rows[real++] = call->products + word_rows[next] * call->stride + image * call->sources;
        }
        if (!real) break;
        for (int64_t i = 0; i < TILE; i++) {
            const float *row = rows[i < real ? i : 0];
            for (int64_t b = 0; b < k; b++) s->packed[b * TILE + i] = row[s->order[b]];
        }
        product(s->packed, s->weights, k, width, s->out);
        for (int64_t i = 0; i < real; i++) {
            float *out = s->out + i * width, best = drops || !call->fused_counts ? -3e38f : 0;
            for (int64_t j = 0; j < tokens; j++)
                out[j] = (out[j] * s->share[j] + (added ? rows[i][n + j] : 0)) * s->norms[j];
            for (int64_t j = 0; j < tokens; j++) {
                best = out[j] > best ? out[j] : best;
                for_tokens[j] = out[j] > for_tokens[j] ? out[j] : for_tokens[j];
            }
            if (drops) {
                float cosine = 0;
                for (int64_t l = 0; l < n; l++) cosine += rows[i][l] * s->fused[l];
                cosine *= fused;
                best = fmaxf(best, cosine);
                for_tokens[tokens] = fmaxf(for_tokens[tokens], cosine);
            }
            for (int64_t f = 0; f < call->fixed; f++) {
                float cosine = rows[i][n + added + f];
                float *token = for_tokens + tokens + 1 + f;
                *token = fmaxf(*token, cosine);
                if (call->fixed_mask[image * call->fixed + f]) best = fmaxf(best, cosine);
            }
            for_words[words[i]] = affinity(best);
        }
    }
    for (int64_t j = 0; j < every; j++) for_tokens[j] = affinity(for_tokens[j]);
}

/* Match all images with captions first..last - 1; returns 0, or 1 where memory is lacking. */
int match_captions(const Call *call, int64_t first, int64_t last) {
    int64_t n = call->patches, k = call->kept, width = call->width;
    size_t floats = k * width + TILE * (n + width) + 3 * width + n;
    char *memory = malloc(4 * (floats + 2 * n));
    if (!memory) return 1;
    Scratch s;
    s.keys = (int32_t *)memory, s.order = s.keys + n;
    s.weights = (float *)(s.order + n), s.packed = s.weights + k * width;
    s.out = s.packed + TILE * n, s.share = s.out + TILE * width;
    s.norms = s.share + width, s.offset = s.norms + width, s.fused = s.offset + width;
    for (int64_t image = 0; image < call->images; image++)
        for (int64_t caption = first; caption < last; caption++) match(call, image, caption, &s);
    free(memory);
    return 0;
}
