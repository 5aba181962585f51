/* Best matches of image-caption pairs on the CPU: the numbers of kernels.py, a pair after another.
 *
 * Compiled at first use (compiled.py). Images are packed a few at a time, captions for those; a
 * block of captions stays near the caches while they pass. Nothing is written but the maxima.
 */
#include <stdlib.h>

#include "native_pair.h"

#define BLOCK_FLOATS (1 << 20) /* of packed words */
#define BLOCK_IMAGES 16        /* packed at once: half a megabyte each with ViT-224 */
#define PLACE 64               /* bytes that everything in scratch begins at */

/* Scratch is one piece of memory: first it is measured, with `base` NULL, then handed out. */
typedef struct {
    char *base;
    size_t used;
} Room;

static void *take(Room *room, int64_t items, size_t bytes) {
    void *place = room->base ? room->base + room->used : NULL;
    room->used += (items * bytes + PLACE - 1) / PLACE * PLACE;
    return place;
}

typedef struct {
    int64_t gram, direct; /* how many captions of a thread are scored in each form */
    Image *images;
    Caption *captions;
    int32_t *places;
    float *words;
    Pair pair;
} Work;

static int64_t packed_floats(const Call *call, int64_t caption, int64_t count) {
    if (!call->direct[caption]) return count * call->channels;
    return panels_of(count) * PANEL * panels_of(call->channels) * PANEL;
}

static int64_t longest_block(const Call *call, int64_t first, int64_t last) {
    int64_t most = BLOCK_FLOATS;
    for (int64_t caption = first; caption < last; caption++) {
        int64_t floats = packed_floats(call, caption, call->words);
        most = floats > most ? floats : most;
    }
    return most;
}

static void lay_out_pair(const Call *call, Pair *pair, Room *room) {
    int64_t n = call->patches, every = every_token(call);
    int64_t tokens = every > call->width ? every : call->width;
    pair->keys = take(room, n, 4);
    pair->kept = take(room, n + 1, 4); /* the last number is written beside the list */
    pair->dropped = take(room, n + 1, 4);
    pair->fused = take(room, n, 4);
    pair->share = take(room, call->width, 4);
    pair->scale = take(room, tokens, 4);
    pair->offset = take(room, call->width, 4);
    pair->products = take(room, ROWS * panels_of(call->sources) * PANEL, 4);
    pair->cosines = take(room, ROWS * call->width, 4);
    pair->tokens = take(room, panels_of(call->channels) * every * PANEL, 4);
    pair->best = take(room, every * LANES, 4);
    pair->seen = take(room, every, 1);
}

static void lay_out(const Call *call, int64_t first, int64_t last, Work *work, Room *room) {
    int64_t channels = panels_of(call->channels) * PANEL;
    int64_t images = at_most(call->images, BLOCK_IMAGES);
    work->images = take(room, images, sizeof(Image));
    work->captions = take(room, last - first, sizeof(Caption));
    work->places = take(room, (last - first) * call->words, 4);
    work->words = take(room, longest_block(call, first, last), 4);
    lay_out_pair(call, &work->pair, room);
    for (int64_t image = 0; image < images; image++) {
        Image none = {0}, *one = room->base ? work->images + image : &none;
        int64_t panels = panels_of(call->sources) * PANEL;
        *one = none;
        if (work->gram) one->panels = take(room, panels * call->channels, 4);
        if (work->direct) one->channels = take(room, call->patches * channels, 4);
        if (work->direct && call->cross) one->added = take(room, call->tokens * channels, 4);
    }
}

/* Pack rows (count, channels) so that panels of channels lie side by side. */
static void pack_channels(const float *rows, int64_t count, int64_t channels, float *packed) {
    for (int64_t first = 0; first < channels; first += PANEL)
        pack(rows + first, 1, channels, at_most(PANEL, channels - first), count, PANEL,
             packed + first * count);
}

/* Pack rows `first`.. of all sources, which lie in up to three places, into panels. */
static void pack_sources(const float *rows, int64_t count, int64_t channels, int64_t first,
                         float *panels) {
    for (int64_t i = 0; i < count;) {
        int64_t column = (first + i) % PANEL, now = at_most(PANEL - column, count - i);
        float *panel = panels + (first + i - column) * channels;
        pack_columns(rows + i * channels, channels, now, channels, PANEL, panel + column);
        i += now;
    }
}

static void prepare_image(const Call *call, int64_t number, Image *image) {
    int64_t n = call->patches, width = call->width, channels = call->channels;
    int64_t added = call->cross ? call->tokens : 0;
    const float *patches = call->patch_rows + number * n * channels;
    const float *more = call->added_rows + number * added * channels;
    image->fixed = call->fixed_rows + number * call->fixed * channels;
    image->peaks = call->peaks + number * n * width;
    image->gram = call->gram ? call->gram + number * n * n : NULL;
    image->cross = call->cross ? call->cross + number * n * width : NULL;
    image->squares = call->cross ? call->squares + number * call->tokens : NULL;
    image->fixed_mask = call->fixed_mask + number * call->fixed;
    if (image->panels) {
        float *panels = (float *)image->panels;
        int64_t last = (panels_of(call->sources) - 1) * PANEL * channels;
        memset(panels + last, 0, 4 * PANEL * channels);
        pack_sources(patches, n, channels, 0, panels);
        pack_sources(more, added, channels, n, panels);
        pack_sources(image->fixed, call->fixed, channels, n + added, panels);
    }
    if (image->channels) pack_channels(patches, n, channels, (float *)image->channels);
    if (image->added) pack_channels(more, added, channels, (float *)image->added);
}

/* Pack the real words of a caption, in tiles for the Gram form, in panels for the direct one. */
static void pack_words(const Call *call, const float *rows, const int32_t *places, int64_t count,
                       int direct, float *packed) {
    int64_t channels = call->channels, most = direct ? PANEL : ROWS;
    int64_t depth = direct ? panels_of(channels) * PANEL : channels;
    for (int64_t part = 0; part < parts_of(count, most); part++) {
        int64_t first = direct ? part * PANEL : part_start(count, most, part);
        int64_t last = direct ? at_most(first + PANEL, count) : part_start(count, most, part + 1);
        int64_t width = direct ? PANEL : last - first;
        float *corner = packed + first * depth;
        if (direct && (last - first < PANEL || channels < depth))
            memset(corner, 0, 4 * width * depth);
        for (int64_t i = first; i < last;) { /* words that follow one another at once */
            int64_t now = 1;
            while (i + now < last && places[i + now] == places[i] + now) now++;
            pack_columns(rows + places[i] * channels, channels, now, channels, width,
                         corner + i - first);
            i += now;
        }
    }
}

static void prepare_caption(const Call *call, int64_t caption, const Work *work, int64_t first,
                            float *packed) {
    Caption *one = work->captions + caption - first;
    const float *rows = call->word_rows + caption * call->words * call->channels;
    one->words = packed;
    pack_words(call, rows, one->places, one->count, call->direct[caption], packed);
}

/* Find the real words of the captions first..last - 1. */
static void find_words(const Call *call, int64_t first, int64_t last, const Work *work) {
    for (int64_t caption = first; caption < last; caption++) {
        const uint8_t *mask = call->word_mask + caption * call->words;
        int32_t *places = work->places + (caption - first) * call->words;
        int64_t count = 0;
        for (int64_t word = 0; word < call->words; word++)
            if (mask[word]) places[count++] = (int32_t)word;
        work->captions[caption - first] = (Caption){count, places, NULL};
    }
}

static void match_pair(const Call *call, int64_t number, int64_t caption, const Image *image,
                       const Caption *words, const Pair *pair) {
    int64_t place = number * call->captions + caption;
    float *for_words = call->for_words + place * call->words;
    float *for_tokens = call->for_tokens + place * every_token(call);
    memset(for_words, 0, 4 * call->words);
    choose(call, call->scores + place * call->patches, image->peaks, pair);
    (call->direct[caption] ? match_direct : match_gram)(call, image, words, pair, for_words,
                                                        for_tokens);
}

/* Match `count` prepared images, of which `from` is the first, with captions first..last - 1. */
static void match_block(const Call *call, int64_t from, int64_t count, int64_t first, int64_t last,
                        const Work *work) {
    for (int64_t block = first, next; block < last; block = next) {
        int64_t used = 0;
        for (next = block; next < last; next++) {
            int64_t floats = packed_floats(call, next, work->captions[next - first].count);
            if (used && used + floats > BLOCK_FLOATS) break;
            prepare_caption(call, next, work, first, work->words + used);
            used += floats;
        }
        for (int64_t image = 0; image < count; image++)
            for (int64_t caption = block; caption < next; caption++)
                match_pair(call, from + image, caption, work->images + image,
                           work->captions + caption - first, &work->pair);
    }
}

/* Match all images with captions first..last - 1; returns 0, or 1 where memory is lacking. */
int match_captions(const Call *call, int64_t first, int64_t last) {
    Work work = {0};
    for (int64_t caption = first; caption < last; caption++)
        call->direct[caption] ? work.direct++ : work.gram++;
    Room room = {0};
    lay_out(call, first, last, &work, &room);
    char *memory = malloc(room.used + PLACE);
    if (!memory) return 1;
    room = (Room){memory + PLACE - (uintptr_t)memory % PLACE, 0};
    lay_out(call, first, last, &work, &room);
    find_words(call, first, last, &work);
    for (int64_t from = 0; from < call->images; from += BLOCK_IMAGES) {
        int64_t count = at_most(BLOCK_IMAGES, call->images - from);
        for (int64_t image = 0; image < count; image++)
            prepare_image(call, from + image, work.images + image);
        match_block(call, from, count, first, last, &work);
    }
    free(memory);
    return 0;
}
