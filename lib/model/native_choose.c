/* Which patches of a pair are kept, and the weights of those that are dropped. */
#include "native_choose.h"
#include "native_pair.h"

/* The largest threshold that at least k keys reach, found bit by bit. */
static int32_t reached_by(const int32_t *keys, int64_t n, int64_t k) {
    int32_t positive = 0;
    for (int64_t l = 0; l < n; l++) positive += keys[l] >= 0;
    int32_t threshold = positive >= k ? 0 : INT32_MIN;
    for (int step = 30; step >= 0; step--) {
        int32_t candidate = threshold + (1 << step), enough = 0;
        for (int64_t l = 0; l < n; l++) enough += keys[l] >= candidate;
        if (enough >= k) threshold = candidate;
        if (enough == k) break; /* any threshold between the k-th and the next will do */
    }
    return threshold;
}

void split_patches(const float *scores, int64_t n, int64_t k, int32_t *keys, int32_t *kept,
                   int32_t *dropped) {
    for (int64_t l = 0; l < n; l++) {
        int32_t bits;
        memcpy(&bits, scores + l, 4);
        bits = bits == INT32_MIN ? 0 : bits;           /* -0 equals 0 */
        keys[l] = bits < 0 ? bits ^ 0x7fffffff : bits; /* integers in the order of the floats */
    }
    int32_t threshold = reached_by(keys, n, k);
    int64_t above = 0, ins = 0, outs = 0;
    for (int64_t l = 0; l < n; l++) above += keys[l] > threshold;
    int64_t room = k - above;
    for (int64_t l = 0; l < n; l++) { /* without a branch: half of them go either way */
        int64_t tied = (keys[l] == threshold) & (room > 0);
        int64_t stays = (keys[l] > threshold) | tied;
        room -= tied;
        kept[ins] = dropped[outs] = (int32_t)l;
        ins += stays, outs += 1 - stays;
    }
}

/* exp of numbers up to 0, to 2e-7 of itself; what is below exp(-87) becomes that. */
static lanes exponential(lanes x) {
    x = larger(x, (lanes){0} - 87);
    whole_lanes power = __builtin_convertvector(x * 1.44269504f - 0.5f, whole_lanes);
    lanes n = __builtin_convertvector(power, lanes);
    lanes r = x - n * 0.693359375f + n * 2.12194440e-4f; /* log 2 in two parts */
    lanes y = r * (1 / 5040.f) + 1 / 720.f;
    y = y * r + 1 / 120.f;
    y = y * r + 1 / 24.f;
    y = y * r + 1 / 6.f;
    y = y * r + 0.5f;
    y = y * r + 1;
    y = y * r + 1;
    return y * (lanes)((power + 127) << 23);
}

void weigh_dropped(const float *scores, int64_t n, int64_t count, const int32_t *dropped,
                   float *weights) {
    float top = NEVER, mass = 0, packed[LANES];
    for (int64_t d = 0; d < count; d++) top = fmaxf(top, scores[dropped[d]]);
    memset(weights, 0, 4 * n);
    for (int64_t first = 0; first < count; first += LANES) {
        int64_t now = at_most(LANES, count - first);
        for (int64_t i = 0; i < LANES; i++)
            packed[i] = scores[dropped[i < now ? first + i : first]] - top;
        lanes found = exponential(*(lanes *)packed);
        for (int64_t i = 0; i < now; i++) mass += weights[dropped[first + i]] = found[i];
    }
    for (int64_t l = 0; l < n; l++) weights[l] /= mass;
}

void choose(const Call *call, const float *scores, const float *peaks, const Pair *pair) {
    int64_t n = call->patches, k = call->kept, width = call->width;
    split_patches(scores, n, k, pair->keys, pair->kept, pair->dropped);
    if (drops(call)) weigh_dropped(scores, n, n - k, pair->dropped, pair->fused);
    for (int64_t v = 0; v < width; v += LANES) {
        lanes mass = {0};
        for (int64_t b = 0; b < k; b++) mass += *(const lanes *)(peaks + pair->kept[b] * width + v);
        for (int64_t j = 0; j < LANES; j++) pair->share[v + j] = 1 / fmaxf(mass[j], 1e-38f);
    }
}
