/* Which patches of a pair are kept, for scoring and for its gradient alike. */
#ifndef NATIVE_CHOOSE_H
#define NATIVE_CHOOSE_H
#include <stdint.h>

/* The k patches of the largest scores, and the others, both ascending; of ties the first are kept.
 * Both lists have room for n + 1, `keys` for n. */
void split_patches(const float *scores, int64_t n, int64_t k, int32_t *keys, int32_t *kept,
                   int32_t *dropped);

/* Softmax of the `count` dropped scores, zero where kept: `weights` has room for n. */
void weigh_dropped(const float *scores, int64_t n, int64_t count, const int32_t *dropped,
                   float *weights);
#endif
