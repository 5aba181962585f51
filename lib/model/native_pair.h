/* What the scoring of pairs shares: the call, what is packed of it, a pair's scratch. */
#ifndef NATIVE_PAIR_H
#define NATIVE_PAIR_H
#include <math.h>

#include "native_tile.h"

#define NEVER -3e38f /* below every cosine */

typedef struct {
    int64_t images, captions, patches, channels, words, fixed, kept;
    int64_t tokens, width;     /* aggregated tokens; the same in whole vectors */
    int64_t sources;           /* of an image: patches, added tokens, fixed tokens */
    int64_t fused_counts;      /* whether words see the zero of a fused token that drops nothing */
    const float *scores;       /* (images, captions, patches) */
    const float *peaks;        /* (images, patches, width): exp(logit - top), padded with zeros */
    const float *gram;         /* (images, patches, patches), NULL where all is direct */
    const float *cross;        /* (images, patches, width) with the added tokens, or NULL */
    const float *squares;      /* (images, tokens) of the added tokens */
    const float *patch_rows;   /* (images, patches, channels) */
    const float *added_rows;   /* (images, tokens, channels), or NULL */
    const float *fixed_rows;   /* (images, fixed, channels) */
    const float *word_rows;    /* (captions, words, channels) */
    const uint8_t *word_mask;  /* (captions, words) */
    const uint8_t *direct;     /* (captions): whose tokens are built */
    const uint8_t *fixed_mask; /* (images, fixed) */
    float *for_words;          /* (images, captions, words) */
    float *for_tokens;         /* (images, captions, tokens + 1 + fixed) */
} Call;

typedef struct {
    const float *panels;   /* Gram form: sources, packed as a right side over channels */
    const float *channels; /* direct form: patches, packed as a right side over patches */
    const float *added;    /* direct form: added tokens, packed likewise */
    const float *fixed;    /* rows of fixed tokens */
    const float *peaks, *gram, *cross, *squares;
    const uint8_t *fixed_mask;
} Image;

typedef struct {
    int64_t count;
    const int32_t *places; /* of its real words among all */
    const float *words;    /* Gram form: a packed left side over channels; direct form: a right */
} Caption;

typedef struct {
    int32_t *keys;
    int32_t *kept, *dropped; /* patches */
    float *fused;            /* (patches) weights of the fused token, zero where kept */
    float *share, *scale;    /* (width, every token) one over mass; what makes a sum a cosine */
    float *offset;           /* (width) */
    float *products;         /* Gram form: (ROWS, panels of sources) */
    float *cosines;          /* Gram form: (ROWS, width) */
    float *tokens;           /* direct form: (panels of channels, every token, PANEL) */
    float *best;             /* direct form: (every token, LANES) */
    uint8_t *seen;           /* direct form: (every token) by words */
} Pair;

FIXED int64_t every_token(const Call *call) { return call->tokens + 1 + call->fixed; }
FIXED int64_t drops(const Call *call) { return call->kept < call->patches; }

FIXED float affinity(float cosine) {
    cosine = cosine > 1 ? 1 : cosine < -1 ? -1 : cosine;
    return cosine > 0 ? cosine : 0.1f * cosine;
}

FIXED float inverse_norm(float square) { return 1 / fmaxf(sqrtf(fmaxf(square, 0)), 1e-12f); }

FIXED float total(lanes values) {
    float sum = 0;
    for (int i = 0; i < LANES; i++) sum += values[i];
    return sum;
}

FIXED float largest(lanes values) {
    float most = values[0];
    for (int i = 1; i < LANES; i++) most = fmaxf(most, values[i]);
    return most;
}

/* Fill kept, dropped, fused, share. */
void choose(const Call *call, const float *scores, const float *peaks, const Pair *pair);
void match_gram(const Call *call, const Image *image, const Caption *caption, const Pair *pair,
                float *for_words, float *for_tokens);
void match_direct(const Call *call, const Image *image, const Caption *caption, const Pair *pair,
                  float *for_words, float *for_tokens);
#endif
