
#ifndef QSD_NO_MAIN
#include <stdio.h>
#include <string.h>
#include <time.h>

static void write_spikes(int layer, const uint8_t *spikes, int steps, int size)
{
    (void)layer;
    fwrite(spikes, 1, (size_t)steps * (size_t)size, stdout);
}

/* Classifies the images in a file, bytes of one image after another. "spikes" writes the spikes of all neurons and
 * max-pools instead, one byte each: by image, layer and step. */
int main(int count, char **arguments)
{
    static uint8_t pixels[QSD_PIXELS];
    int32_t output[QSD_CLASSES];
    int images = 0, stepped, shown;
    size_t got;
    clock_t used = 0;
    FILE *file;
    shown = count == 3 && !strcmp(arguments[1], "spikes");
    stepped = shown || (count == 3 && !strcmp(arguments[1], "step"));
    if (count != 3 || (!stepped && strcmp(arguments[1], "count"))) {
        fprintf(stderr, "usage: %s count|step|spikes FILE\n", arguments[0]);
        return 2;
    }
    file = fopen(arguments[2], "rb");
    if (!file) {
        fprintf(stderr, "%s cannot be read.\n", arguments[2]);
        return 2;
    }
    for (; (got = fread(pixels, 1, sizeof pixels, file)) == sizeof pixels; ++images) {
        int best = 0;
        clock_t start = clock();
        if (stepped)
            QSD_STEP(pixels, output, shown ? write_spikes : NULL);
        else
            QSD_COUNT(pixels, output);
        used += clock() - start;
        for (int i = 1; i < QSD_CLASSES; ++i)
            if (output[i] > output[best])
                best = i;
        if (shown)
            continue;
        printf("%d", best);
        for (int i = 0; i < QSD_CLASSES; ++i)
            printf(" %ld", (long)output[i]);
        printf("\n");
    }
    fclose(file);
    if (got) {
        fprintf(stderr, "%s has %lu bytes after %d images, and an image has %d.\n", arguments[2], (unsigned long)got,
                images, QSD_PIXELS);
        return 2;
    }
    if (images)
        fprintf(stderr, "%d images, %ld microseconds each\n", images,
                (long)(used / images) * (1000000L / (long)CLOCKS_PER_SEC));
    return 0;
}
#endif
