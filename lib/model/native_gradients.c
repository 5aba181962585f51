/* Gradients of the best matches of native_match.c, pair by pair: what they were is computed again.
 *
 * A maximum has one pair of token and word, so of n x N cosines few have gradient. With weights w
 * of a token (W = [N][kept]), products P with words, norm |S| = sqrt(w'Gw) and gradient g of a
 * cosine c = w'P / |S|:
 *
 *     dP = w g / |S|,    dG = -w w' sum(g c) / 2|S|^2,    dw = P g / |S| - G w sum(g c) / |S|^2,
 *
 * and dw goes through the softmax over the kept patches to the logits, the fused token's through
 * the one over the dropped patches to the scores. dP takes the place of P; dG and the gradients of
 * the logits are summed over an image's captions. Which patches are kept has no gradient.
 */
#include <math.h>
#include <stdlib.h>

#include "native_kept.h"

#define NOTHING -3e38f
#define SMALLEST_SQUARE 4e-24f /* of a norm; below, a token is a zero without gradient */

typedef struct {
    int64_t images, captions, patches, tokens, width, fixed, words, kept;
    int64_t sources;              /* products of an image: patches, added tokens, fixed tokens */
    int64_t fused_counts;         /* whether words see the zero of a fused token that drops nothing */
    const int64_t *starts;        /* (images + 1) of an image among the pairs */
    const int32_t *captions_of;   /* (pairs) */
    const int64_t *rows_of;       /* (pairs) the row of products of a caption's first real word */
    const float *scores;          /* (images, captions, patches) */
    const float *peaks;           /* (images, tokens, patches): exp(logit - top) */
    const float *peaks_by_patch;  /* (images, patches, width): the same, padded with zeros */
    const float *gram;            /* (images, patches, patches) */
    const float *cross;           /* (images, tokens, patches) of the added tokens, or NULL */
    const float *squares;         /* (images, tokens) of the added tokens */
    const uint8_t *word_mask;     /* (captions, words) */
    const uint8_t *fixed_mask;    /* (images, fixed) */
    const float *for_words;       /* (images, captions, words): gradients of the affinities */
    const float *for_tokens;      /* (images, captions, tokens + 1 + fixed) */
    float *products;              /* rows of `sources`; their gradients when this returns */
    float *d_scores;              /* (images, captions, patches); it and the rest begin as zeros */
    float *d_logits;              /* (images, tokens, patches) */
    float *d_gram;                /* (images, patches, patches), or NULL; symmetric */
    float *d_cross;               /* (images, tokens, patches) */
    float *d_squares;             /* (images, tokens) */
} Gradients;

typedef struct {
    Kept kept;
    int64_t every, columns;                   /* tokens + 1 + fixed, up to whole vectors */
    float *weights, *by_patch, *gram, *moved; /* W; its transpose, not normalised; kept G; W G */
    float *cross, *d_weights, *tile;
    float *share, *inverse, *steepness; /* of a token: 1 / mass, 1 / norm, d(norm^2) */
    float *fused, *fused_moved, *d_fused;
    float *products, *d_products;      /* of words with kept patches */
    float *cosines, *gradients, *sums; /* [words][columns] */
    float *best, *unseen;              /* of a token; added to what words do not see */
    float *slopes;                     /* of a token's best word; then that over its number */
} Scratch;

/* The fused token that drops nothing keeps its first inverse, 0: no gradient passes. */
static float inverse_norm(float square) {
    return square < SMALLEST_SQUARE ? 0 : 1 / sqrtf(square);
}

FIXED float dot(const float *one, const float *other, int64_t count) {
    float sum = 0;
    for (int64_t l = 0; l < count; l++) sum += one[l] * other[l];
    return sum;
}

FIXED void add_scaled(float *to, const float *from, float scale, int64_t count) {
    for (int64_t l = 0; l < count; l++) to[l] += scale * from[l];
}

/* The aggregated tokens of a pair: weights, kept part of G, norms. */
static void weigh(const Gradients *call, int64_t image, Scratch *s) {
    int64_t n = call->patches, tokens = call->tokens, room = s->kept.room, k = s->kept.count;
    const float *peaks = call->peaks + image * tokens * n, *gram = call->gram + image * n * n;
    for (int64_t j = 0; j < tokens; j++) {
        float *weights = s->weights + j * room, mass = 0;
        take_kept(&s->kept, peaks + j * n, weights);
        for (int64_t b = 0; b < room; b++) mass += weights[b];
        s->share[j] = 1 / fmaxf(mass, 1e-38f);
    }
    for (int64_t b = 0; b < k; b++) {
        int64_t patch = s->kept.order[b];
        memcpy(s->by_patch + b * call->width,
               call->peaks_by_patch + (image * n + patch) * call->width, 4 * call->width);
        take_kept(&s->kept, gram + patch * n, s->gram + b * room);
    }
    for (int64_t j = 0; j < tokens; j++)
        for (int64_t b = 0; b < room; b++) s->weights[j * room + b] *= s->share[j];
    multiply_strided(tokens, s->weights, room, 1, room, s->gram, room, k, s->moved, room);
    for (int64_t j = 0; j < tokens; j++) {
        const float *weights = s->weights + j * room;
        float square = dot(weights, s->moved + j * room, room);
        if (call->cross) {
            float *cross = s->cross + j * room;
            take_kept(&s->kept, call->cross + (image * tokens + j) * n, cross);
            square += 2 * dot(weights, cross, room) + call->squares[image * tokens + j];
        }
        s->inverse[j] = inverse_norm(square);
    }
}

/* The fused token: weights of the dropped patches, zero where kept, and its norm. */
static void fuse(const Gradients *call, const float *gram, const float *scores, Scratch *s) {
    int64_t n = call->patches, k = s->kept.count;
    const int32_t *dropped = s->kept.dropped;
    weigh_dropped(scores, n, n - k, dropped, s->fused);
    memset(s->fused_moved, 0, 4 * n);
    for (int64_t d = 0; d < n - k; d++)
        add_scaled(s->fused_moved, gram + dropped[d] * n, s->fused[dropped[d]], n);
    s->inverse[call->tokens] = inverse_norm(dot(s->fused, s->fused_moved, n));
}

/* Cosines of all tokens with `count` words whose products begin at `rows`. */
static void compare(const Gradients *call, const float *rows, int64_t count, Scratch *s) {
    int64_t n = call->patches, tokens = call->tokens, room = s->kept.room;
    int64_t added = call->cross ? tokens : 0;
    for (int64_t q = 0; q < count; q++)
        take_kept(&s->kept, rows + q * call->sources, s->products + q * room);
    multiply_strided(count, s->products, room, 1, call->width, s->by_patch, call->width,
                     s->kept.count, s->sums, call->width);
    for (int64_t q = 0; q < count; q++) {
        const float *row = rows + q * call->sources, *sums = s->sums + q * call->width;
        float *cosines = s->cosines + q * s->columns;
        for (int64_t j = 0; j < tokens; j++) cosines[j] = sums[j] * s->share[j] * s->inverse[j];
        for (int64_t j = 0; j < added; j++) cosines[j] += row[n + j] * s->inverse[j];
        cosines[tokens] = s->kept.count < n ? dot(row, s->fused, n) * s->inverse[tokens] : 0;
        for (int64_t f = 0; f < call->fixed; f++) cosines[tokens + 1 + f] = row[n + added + f];
        for (int64_t e = s->every; e < s->columns; e++) cosines[e] = NOTHING;
    }
}

static float slope(float cosine) { return cosine > 0 ? 1 : 0.1f; }

/* Gradients of the cosines: those of the maxima, shared evenly by all that are equal. */
static void differentiate(const Gradients *call, const uint8_t *mask, const float *for_words,
                          const float *for_tokens, int64_t count, Scratch *s) {
    int64_t columns = s->columns;
    memset(s->slopes, 0, 4 * columns);
    for (int64_t e = 0; e < columns; e++) s->best[e] = NOTHING;
    for (int64_t q = 0; q < count; q++)
        for (int64_t e = 0; e < columns; e++)
            s->best[e] = fmaxf(s->best[e], s->cosines[q * columns + e]);
    for (int64_t q = 0; q < count; q++)
        for (int64_t e = 0; e < columns; e++)
            s->slopes[e] += s->cosines[q * columns + e] == s->best[e];
    for (int64_t e = 0; e < s->every; e++)
        s->slopes[e] = for_tokens[e] * slope(s->best[e]) / s->slopes[e];
    for (int64_t e = s->every; e < columns; e++) s->slopes[e] = 0;
    for (int64_t word = 0, q = 0; q < count; word++) {
        if (!mask[word]) continue;
        const float *cosines = s->cosines + q * columns;
        float *gradients = s->gradients + q++ * columns, best = NOTHING, equal = 0;
        for (int64_t e = 0; e < columns; e++) best = fmaxf(best, cosines[e] + s->unseen[e]);
        for (int64_t e = 0; e < columns; e++) equal += cosines[e] + s->unseen[e] == best;
        float share = for_words[word] * slope(best) / equal;
        for (int64_t e = 0; e < columns; e++) {
            gradients[e] = cosines[e] == s->best[e] ? s->slopes[e] : 0;
            gradients[e] += cosines[e] + s->unseen[e] == best ? share : 0;
        }
    }
    memset(s->steepness, 0, 4 * columns);
    for (int64_t q = 0; q < count; q++)
        for (int64_t e = 0; e < s->every; e++)
            s->steepness[e] += s->gradients[q * columns + e] * s->cosines[q * columns + e];
    for (int64_t e = 0; e <= call->tokens; e++) s->steepness[e] *= -0.5f * s->inverse[e] * s->inverse[e];
}

/* Through the weights of the aggregated tokens to logits and added tokens. */
static void to_logits(const Gradients *call, int64_t image, int64_t count, Scratch *s) {
    int64_t tokens = call->tokens, room = s->kept.room;
    memset(s->d_products, 0, 4 * count * room);
    for (int64_t j = 0; j < tokens; j++) {
        int64_t place = image * tokens + j;
        const float *weights = s->weights + j * room;
        float *d_weights = s->d_weights, steep = 2 * s->steepness[j];
        for (int64_t b = 0; b < room; b++) d_weights[b] = steep * s->moved[j * room + b];
        if (call->cross) {
            add_scaled(d_weights, s->cross + j * room, steep, room);
            call->d_squares[place] += s->steepness[j];
            for (int64_t b = 0; b < room; b++) s->tile[b] = steep * weights[b];
            add_kept(&s->kept, s->tile, 0, call->d_cross + place * call->patches);
        }
        for (int64_t q = 0; q < count; q++) {
            float gradient = s->gradients[q * s->columns + j] * s->inverse[j];
            if (gradient == 0) continue;
            add_scaled(d_weights, s->products + q * room, gradient, room);
            add_scaled(s->d_products + q * room, weights, gradient, room);
        }
        float mean = dot(weights, d_weights, room);
        for (int64_t b = 0; b < room; b++) d_weights[b] = weights[b] * (d_weights[b] - mean);
        add_kept(&s->kept, d_weights, 0, call->d_logits + place * call->patches);
    }
}

/* Through the norms of the aggregated tokens to the upper triangle of G: W' diag(steepness) W. */
static void to_gram(const Gradients *call, int64_t image, Scratch *s) {
    int64_t n = call->patches, tokens = call->tokens, room = s->kept.room, k = s->kept.count;
    float *d_gram = call->d_gram + image * n * n, *steep = s->moved; /* it is not read any more */
    for (int64_t j = 0; j < tokens; j++)
        for (int64_t b = 0; b < room; b++)
            steep[j * room + b] = s->steepness[j] * s->weights[j * room + b];
    for (int64_t t = 0; t < parts_of(k, ROWS); t++) {
        int64_t first = part_start(k, ROWS, t), last = part_start(k, ROWS, t + 1);
        int64_t from = first / LANES * LANES;
        multiply_strided(last - first, steep + first, 1, room, room - from, s->weights + from, room,
                         tokens, s->tile + from, room);
        for (int64_t a = first; a < last; a++) {
            int64_t patch = s->kept.order[a];
            add_kept(&s->kept, s->tile + (a - first) * room, patch, d_gram + patch * n);
        }
    }
}

/* The same of the fused token; its gradient goes to the scores. */
static void from_fused(const Gradients *call, int64_t image, const float *rows, int64_t count,
                       float *d_scores, Scratch *s) {
    int64_t n = call->patches, token = call->tokens;
    float steep = s->steepness[token];
    for (int64_t l = 0; l < n; l++) s->d_fused[l] = 2 * steep * s->fused_moved[l];
    for (int64_t q = 0; q < count; q++) {
        float gradient = s->gradients[q * s->columns + token] * s->inverse[token];
        if (gradient != 0) add_scaled(s->d_fused, rows + q * call->sources, gradient, n);
    }
    float mean = dot(s->fused, s->d_fused, n);
    for (int64_t l = 0; l < n; l++) d_scores[l] = s->fused[l] * (s->d_fused[l] - mean);
    if (!call->d_gram) return;
    for (int64_t d = 0; d < n - s->kept.count; d++) {
        int64_t patch = s->kept.dropped[d], from = patch / LANES * LANES;
        float *row = call->d_gram + (image * n + patch) * n;
        add_scaled(row + from, s->fused + from, steep * s->fused[patch], n - from);
    }
}

/* Put the gradients of the products where those are. */
static void to_products(const Gradients *call, float *rows, int64_t count, Scratch *s) {
    int64_t n = call->patches, tokens = call->tokens, added = call->cross ? tokens : 0;
    for (int64_t q = 0; q < count; q++) {
        const float *gradients = s->gradients + q * s->columns;
        float *row = rows + q * call->sources;
        put_kept(&s->kept, s->d_products + q * s->kept.room, s->fused,
                 gradients[tokens] * s->inverse[tokens], row);
        for (int64_t j = 0; j < added; j++) row[n + j] = gradients[j] * s->inverse[j];
        for (int64_t f = 0; f < call->fixed; f++) row[n + added + f] = gradients[tokens + 1 + f];
    }
}

static void match_back(const Gradients *call, int64_t image, int64_t pair, Scratch *s) {
    int64_t n = call->patches, caption = call->captions_of[pair], count = 0;
    int64_t place = image * call->captions + caption;
    const uint8_t *mask = call->word_mask + caption * call->words;
    const float *scores = call->scores + place * n;
    float *rows = call->products + call->rows_of[pair] * call->sources;
    for (int64_t word = 0; word < call->words; word++) count += mask[word];
    if (!count) return;
    choose_kept(&s->kept, scores);
    weigh(call, image, s);
    if (call->kept < n) fuse(call, call->gram + image * n * n, scores, s);
    compare(call, rows, count, s);
    differentiate(call, mask, call->for_words + place * call->words,
                  call->for_tokens + place * s->every, count, s);
    to_logits(call, image, count, s);
    if (call->d_gram) to_gram(call, image, s);
    if (call->kept < n) from_fused(call, image, rows, count, call->d_scores + place * n, s);
    to_products(call, rows, count, s);
}

/* Which tokens of an image words do not see. */
static void hide(const Gradients *call, int64_t image, Scratch *s) {
    int64_t tokens = call->tokens;
    memset(s->unseen, 0, 4 * s->columns);
    if (call->kept == call->patches && !call->fused_counts) s->unseen[tokens] = NOTHING / 2;
    for (int64_t f = 0; f < call->fixed; f++)
        if (!call->fixed_mask[image * call->fixed + f]) s->unseen[tokens + 1 + f] = NOTHING / 2;
}

static float *reserve(float *memory, int64_t *floats, int64_t count) {
    float *here = memory ? memory + *floats : NULL;
    *floats += whole(count) + LANES; /* packed rows are written and read beyond their end */
    return here;
}

/* Share out `memory`, which may be NULL; returns how many floats it needs. */
static int64_t lay_out(const Gradients *call, float *memory, Scratch *s) {
    int64_t n = call->patches, k = call->kept, tokens = call->tokens, words = call->words;
    int64_t room = whole(k), every = tokens + 1 + call->fixed, columns = whole(every), floats = 0;
    struct {
        void *to;
        int64_t count;
    } parts[] = {
        {&s->kept.keys, n}, {&s->kept.order, n + 1}, {&s->kept.dropped, n + 1},
        {&s->kept.blocks, n}, {&s->kept.starts, n},
        {&s->weights, tokens * room}, {&s->by_patch, k * call->width}, {&s->gram, k * room},
        {&s->moved, tokens * room}, {&s->cross, tokens * room}, {&s->d_weights, room},
        {&s->tile, ROWS * room}, {&s->fused, n}, {&s->fused_moved, n}, {&s->d_fused, n},
        {&s->products, words * room}, {&s->d_products, words * room},
        {&s->cosines, words * columns}, {&s->gradients, words * columns},
        {&s->sums, words * call->width}, {&s->share, columns}, {&s->inverse, columns},
        {&s->steepness, columns}, {&s->best, columns}, {&s->unseen, columns}, {&s->slopes, columns},
    };
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++)
        *(float **)parts[i].to = reserve(memory, &floats, parts[i].count);
    s->every = every, s->columns = columns;
    s->kept.patches = n, s->kept.count = k, s->kept.room = room;
    return floats;
}

/* Gradients of the pairs of images first..last - 1; returns 0, or 1 where memory is lacking. */
int match_captions_back(const Gradients *call, int64_t first, int64_t last) {
    Scratch s;
    int64_t n = call->patches, floats = lay_out(call, NULL, &s);
    float *memory = calloc(floats, 4);
    if (!memory) return 1;
    lay_out(call, memory, &s);
    for (int64_t image = first; image < last; image++) {
        hide(call, image, &s);
        for (int64_t pair = call->starts[image]; pair < call->starts[image + 1]; pair++)
            match_back(call, image, pair, &s);
        if (!call->d_gram) continue;
        float *d_gram = call->d_gram + image * n * n;
        for (int64_t l = 0; l < n; l++)
            for (int64_t m = 0; m < l; m++) d_gram[l * n + m] = d_gram[m * n + l];
    }
    free(memory);
    return 0;
}
