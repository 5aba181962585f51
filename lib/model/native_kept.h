/* Rows over patches and their kept entries side by side; products of what is packed so.
 *
 * With AVX-512 sixteen numbers are packed by one instruction, elsewhere one at a time.
 */
#ifndef NATIVE_KEPT_H
#define NATIVE_KEPT_H
#include "native_choose.h"
#include "native_tile.h"

#ifdef __AVX512F__
#include <immintrin.h>
#endif

typedef struct {
    int64_t patches, count;
    int64_t room;     /* of a packed row: `count` up to whole vectors, the rest zeros */
    int32_t *keys;    /* scratch of `split_patches` */
    int32_t *order;   /* the kept patches, ascending */
    int32_t *dropped; /* the others, ascending */
    uint16_t *blocks; /* which of 16 patches are kept */
    int32_t *starts;  /* kept patches before these 16 */
} Kept;

FIXED int64_t whole(int64_t count) { return (count + LANES - 1) / LANES * LANES; }

static void choose_kept(Kept *kept, const float *scores) {
    int64_t n = kept->patches, b = 0;
    split_patches(scores, n, kept->count, kept->keys, kept->order, kept->dropped);
    for (int64_t block = 0; block * 16 < n; block++) {
        uint32_t here = 0;
        kept->starts[block] = (int32_t)b;
        for (; b < kept->count && kept->order[b] < block * 16 + 16; b++)
            here |= 1u << kept->order[b] % 16;
        kept->blocks[block] = (uint16_t)here;
    }
}

/* packed = the kept entries of `row`, then zeros up to `room`; what lies behind may be overwritten. */
static void take_kept(const Kept *kept, const float *row, float *packed) {
#ifdef __AVX512F__
    *(lanes *)(packed + kept->room - LANES) = (lanes){0};
    for (int64_t block = 0; block * 16 < kept->patches; block++) {
        __mmask16 here = kept->blocks[block];
        __m512 entries = _mm512_maskz_loadu_ps(here, row + block * 16);
        _mm512_storeu_ps(packed + kept->starts[block], _mm512_maskz_compress_ps(here, entries));
    }
#else
    for (int64_t b = 0; b < kept->count; b++) packed[b] = row[kept->order[b]];
    memset(packed + kept->count, 0, 4 * (kept->room - kept->count));
#endif
}

/* row[kept] += packed, from patch `first` on at least; reads 16 numbers beyond `packed`. */
static void add_kept(const Kept *kept, const float *packed, int64_t first, float *row) {
#ifdef __AVX512F__
    for (int64_t block = first / 16; block * 16 < kept->patches; block++) {
        __mmask16 here = kept->blocks[block];
        __m512 added = _mm512_maskz_expandloadu_ps(here, packed + kept->starts[block]);
        __m512 entries = _mm512_maskz_loadu_ps(here, row + block * 16);
        _mm512_mask_storeu_ps(row + block * 16, here, _mm512_add_ps(entries, added));
    }
#else
    for (int64_t b = kept->starts[first / 16]; b < kept->count; b++)
        row[kept->order[b]] += packed[b];
#endif
}

/* row = packed where kept, share * dropped elsewhere (`dropped` is zero where kept). */
static void put_kept(const Kept *kept, const float *packed, const float *dropped, float share,
                     float *row) {
#ifdef __AVX512F__
    for (int64_t block = 0; block * 16 < kept->patches; block++) {
        int64_t left = kept->patches - block * 16;
        __mmask16 real = left < 16 ? (__mmask16)((1u << left) - 1) : (__mmask16)-1;
        __m512 put = _mm512_maskz_expandloadu_ps(kept->blocks[block], packed + kept->starts[block]);
        __m512 others = _mm512_maskz_loadu_ps(real, dropped + block * 16);
        put = _mm512_fmadd_ps(others, _mm512_set1_ps(share), put);
        _mm512_mask_storeu_ps(row + block * 16, real, put);
    }
#else
    for (int64_t l = 0; l < kept->patches; l++) row[l] = share * dropped[l];
    for (int64_t b = 0; b < kept->count; b++) row[kept->order[b]] = packed[b];
#endif
}

/* A tile of left x right that reads both sides where they lie: left[i * item + b * step]. */
typedef void Strided(const float *left, int64_t item, int64_t step, const float *right,
                     int64_t row, int64_t depth, float *out, int64_t stride);

#define STRIDED(R, W)                                                                             \
    static void strided_##R##_##W(const float *left, int64_t item, int64_t step,                  \
                                  const float *right, int64_t row, int64_t depth, float *out,     \
                                  int64_t stride) {                                               \
        lanes sum[R][W];                                                                          \
        UNROLLED for (int i = 0; i < R; i++)                                                      \
            UNROLLED for (int w = 0; w < W; w++) sum[i][w] = (lanes){0};                          \
        for (int64_t b = 0; b < depth; b++, left += step, right += row) {                         \
            lanes side[W];                                                                        \
            UNROLLED for (int w = 0; w < W; w++) side[w] = *(const lanes *)(right + w * LANES);   \
            UNROLLED for (int i = 0; i < R; i++)                                                  \
                UNROLLED for (int w = 0; w < W; w++) sum[i][w] += left[i * item] * side[w];       \
        }                                                                                         \
        UNROLLED for (int i = 0; i < R; i++)                                                      \
            UNROLLED for (int w = 0; w < W; w++)                                                  \
                *(lanes *)(out + i * stride + w * LANES) = sum[i][w];                             \
    }
#define STRIDED_PAIR(R) {strided_##R##_1, strided_##R##_2}
#define STRIDED_BOTH(R) STRIDED(R, 1) STRIDED(R, 2)

STRIDED_BOTH(1) STRIDED_BOTH(2) STRIDED_BOTH(3) STRIDED_BOTH(4) STRIDED_BOTH(5) STRIDED_BOTH(6)
#if ROWS == 14
STRIDED_BOTH(7) STRIDED_BOTH(8) STRIDED_BOTH(9) STRIDED_BOTH(10)
STRIDED_BOTH(11) STRIDED_BOTH(12) STRIDED_BOTH(13) STRIDED_BOTH(14)
#endif
static Strided *const strided[ROWS][VECTORS] = {
    STRIDED_PAIR(1), STRIDED_PAIR(2), STRIDED_PAIR(3), STRIDED_PAIR(4), STRIDED_PAIR(5),
    STRIDED_PAIR(6),
#if ROWS == 14
    STRIDED_PAIR(7), STRIDED_PAIR(8), STRIDED_PAIR(9), STRIDED_PAIR(10), STRIDED_PAIR(11),
    STRIDED_PAIR(12), STRIDED_PAIR(13), STRIDED_PAIR(14),
#endif
};

/* out = left x right: `width` columns, whole vectors. */
static void multiply_strided(int64_t rows, const float *left, int64_t item, int64_t step,
                             int64_t width, const float *right, int64_t row, int64_t depth,
                             float *out, int64_t stride) {
    for (int64_t t = 0; t < parts_of(rows, ROWS); t++) {
        int64_t first = part_start(rows, ROWS, t), count = part_start(rows, ROWS, t + 1) - first;
        for (int64_t column = 0; column < width; column += PANEL)
            strided[count - 1][width - column > LANES](left + first * item, item, step,
                                                       right + column, row, depth,
                                                       out + first * stride + column, stride);
    }
}
#endif
