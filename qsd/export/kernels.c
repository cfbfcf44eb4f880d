/* Layers of an integer network. Sums fit into 32 bits: their ranges are proved where the file is written. Spikes and
 * counts are bytes, everything else is int32_t. In steps a value of T steps lies in memory one step after another. */

#if defined(__GNUC__)
#define QSD_UNUSED __attribute__((unused))
#else
#define QSD_UNUSED
#endif

typedef struct {
    int channels, height, width, outputs, out_height, out_width;
    int kernel_height, kernel_width, stride_y, stride_x, top, left, dilation_y, dilation_x, groups;
    int packed;             /* Whether a byte holds two weights of 4 bits. */
    int codes;              /* Entries of a table for each output channel; 0 for no table. */
    const uint8_t *weight;  /* Weights as two's complement. */
    const int32_t *table;   /* Entries by output channel and weight, or NULL. */
} qsd_convolution;

typedef struct {
    int channels, positions, shared, steps; /* shared: All channels have the same thresholds. */
    const int32_t *thresholds;              /* By channel, then by spike. */
    const int8_t *direction;                /* By channel, or NULL. */
} qsd_neuron;

/* A right shift that rounds down, also of negative numbers. */
QSD_UNUSED static int64_t qsd_shift(int64_t value, int places)
{
    return value >= 0 ? value >> places : -1 - ((-1 - value) >> places);
}

static int32_t qsd_weight(const qsd_convolution *c, int output, int32_t index)
{
    int code;
    if (c->packed)
        code = (c->weight[index / 2] >> (index % 2 * 4)) & 15;
    else
        code = c->weight[index];
    if (c->table)
        return c->table[output * c->codes + (code & (c->codes - 1))];
    if (c->packed)
        return (code ^ 8) - 8;
    return (code ^ 128) - 128;
}

/* The part of a row of outputs that a column of the kernel reaches. */
static void qsd_reach(const qsd_convolution *c, int column, int *first, int *end)
{
    int shift = c->left - column * c->dilation_x, last = c->width - 1 + shift;
    *first = shift > 0 ? shift : 0;
    *end = last < 0 ? 0 : last + 1;
    if (c->stride_x > 1) { /* Divisions take long. */
        *first = (*first + c->stride_x - 1) / c->stride_x;
        *end = (*end + c->stride_x - 1) / c->stride_x;
    }
    if (*end > c->out_width)
        *end = c->out_width;
}

/* A convolution as a loop over weights and rows. TERM adds what one weight and one input contribute. */
#define QSD_CONVOLVE(NAME, TYPE, TERM)                                                                              \
    QSD_UNUSED static void NAME(const qsd_convolution *c, const TYPE *x, int32_t *y)                                \
    {                                                                                                               \
        int seen = c->channels / c->groups, made = c->outputs / c->groups, area = c->out_height * c->out_width;    \
        int32_t index = 0;                                                                                          \
        for (int o = 0; o < c->outputs; ++o) {                                                                      \
            int32_t *plane = y + o * area;                                                                          \
            for (int i = 0; i < area; ++i)                                                                          \
                plane[i] = 0;                                                                                       \
            for (int i = 0; i < seen; ++i) {                                                                        \
                const TYPE *image = x + (o / made * seen + i) * c->height * c->width;                               \
                for (int ky = 0; ky < c->kernel_height; ++ky) {                                                     \
                    for (int kx = 0; kx < c->kernel_width; ++kx) {                                                  \
                        int first, end;                                                                             \
                        int32_t w = qsd_weight(c, o, index++);                                                      \
                        qsd_reach(c, kx, &first, &end);                                                             \
                        for (int row = 0; w && row < c->out_height; ++row) {                                        \
                            int from = row * c->stride_y - c->top + ky * c->dilation_y;                             \
                            if (from < 0 || from >= c->height)                                                      \
                                continue;                                                                           \
                            int column = kx * c->dilation_x - c->left;                                              \
                            const TYPE *source = image + from * c->width;                                           \
                            int32_t *target = plane + row * c->out_width;                                           \
                            if (c->stride_x == 1)                                                                   \
                                for (int i2 = first; i2 < end; ++i2)                                                \
                                    target[i2] += TERM(w, source[i2 + column]);                                     \
                            else                                                                                    \
                                for (int i2 = first; i2 < end; ++i2)                                                \
                                    target[i2] += TERM(w, source[i2 * c->stride_x + column]);                       \
                        }                                                                                           \
                    }                                                                                               \
                }                                                                                                   \
            }                                                                                                       \
        }                                                                                                           \
    }

#define QSD_TIMES(w, x) ((w) * (int32_t)(x))
#define QSD_GATED(w, x) ((w) & -(int32_t)(x)) /* The weight where a spike falls, else 0: no multiplication. */
QSD_CONVOLVE(qsd_convolve_counts, uint8_t, QSD_TIMES)
QSD_CONVOLVE(qsd_convolve_spikes, uint8_t, QSD_GATED)
QSD_CONVOLVE(qsd_convolve_integers, int32_t, QSD_TIMES)

QSD_UNUSED static void qsd_add_bias(const int32_t *bias, int channels, int positions, int32_t *y)
{
    for (int c = 0; c < channels; ++c)
        for (int i = 0; i < positions; ++i)
            y[c * positions + i] += bias[c];
}

QSD_UNUSED static void qsd_look_up(const int32_t *table, int channels, int positions, const uint8_t *x, int32_t *y)
{
    for (int c = 0; c < channels; ++c)
        for (int i = 0; i < positions; ++i)
            y[c * positions + i] = table[c * 256 + x[c * positions + i]];
}

QSD_UNUSED static void qsd_copy(const uint8_t *x, int size, uint8_t *y)
{
    for (int i = 0; i < size; ++i)
        y[i] = x[i];
}

/* Counts as spikes in the first steps. */
QSD_UNUSED static void qsd_spread(const uint8_t *x, int steps, int size, uint8_t *y)
{
    for (int t = 0; t < steps; ++t)
        for (int i = 0; i < size; ++i)
            y[t * size + i] = x[i] > t;
}

QSD_UNUSED static void qsd_rescale(const int32_t *multiplier, int shift, int channels, int positions, const int32_t *x,
                                   int32_t *y)
{
    int64_t half = shift ? (int64_t)1 << (shift - 1) : 0;
    for (int c = 0; c < channels; ++c)
        for (int i = c * positions; i < (c + 1) * positions; ++i)
            y[i] = (int32_t)qsd_shift((int64_t)x[i] * multiplier[c] + half, shift);
}

QSD_UNUSED static void qsd_sum_steps(const int32_t *x, int steps, int size, int32_t *y)
{
    for (int i = 0; i < size; ++i) {
        y[i] = 0;
        for (int t = 0; t < steps; ++t)
            y[i] += x[t * size + i];
    }
}

QSD_UNUSED static void qsd_add(const int32_t *a, const int32_t *b, int size, int32_t *y)
{
    for (int i = 0; i < size; ++i)
        y[i] = a[i] + b[i];
}

QSD_UNUSED static void qsd_total(const int32_t *x, int channels, int positions, int32_t *y)
{
    for (int c = 0; c < channels; ++c) {
        y[c] = 0;
        for (int i = 0; i < positions; ++i)
            y[c] += x[c * positions + i];
    }
}

QSD_UNUSED static void qsd_zero(int32_t *y, int size)
{
    for (int i = 0; i < size; ++i)
        y[i] = 0;
}

/* In counts: the number of thresholds that a membrane reaches. */
QSD_UNUSED static void qsd_count_spikes(const qsd_neuron *n, const int32_t *x, uint8_t *y)
{
    for (int c = 0; c < n->channels; ++c) {
        const int32_t *thresholds = n->thresholds + (n->shared ? 0 : c * n->steps);
        int negated = n->direction && n->direction[c] < 0;
        for (int i = c * n->positions; i < (c + 1) * n->positions; ++i) {
            int32_t membrane = negated ? -x[i] : x[i];
            int count = 0;
            for (int k = 0; k < n->steps; ++k)
                count += membrane >= thresholds[k];
            y[i] = (uint8_t)count;
        }
    }
}

/* In steps: the membrane charges in the steps 1 to T, and the neuron may fire in the steps T to 2 T - 1. */
QSD_UNUSED static void qsd_fire(const qsd_neuron *n, const int32_t *x, uint8_t *y)
{
    int size = n->channels * n->positions;
    for (int c = 0; c < n->channels; ++c) {
        const int32_t *thresholds = n->thresholds + (n->shared ? 0 : c * n->steps);
        int negated = n->direction && n->direction[c] < 0;
        for (int i = c * n->positions; i < (c + 1) * n->positions; ++i) {
            int32_t membrane = 0;
            for (int step = 0; step < 2 * n->steps - 1; ++step) {
                if (step < n->steps)
                    membrane += x[step * size + i];
                if (step >= n->steps - 1) {
                    int k = step - n->steps + 1;
                    y[k * size + i] = (uint8_t)((negated ? -membrane : membrane) >= thresholds[k]);
                }
            }
        }
    }
}

QSD_UNUSED static void qsd_max_pool(const qsd_convolution *c, const uint8_t *x, uint8_t *y)
{
    for (int o = 0; o < c->channels; ++o)
        for (int row = 0; row < c->out_height; ++row)
            for (int column = 0; column < c->out_width; ++column) {
                uint8_t largest = 0;
                for (int ky = 0; ky < c->kernel_height; ++ky)
                    for (int kx = 0; kx < c->kernel_width; ++kx) {
                        int i = row * c->stride_y - c->top + ky * c->dilation_y;
                        int j = column * c->stride_x - c->left + kx * c->dilation_x;
                        if (i < 0 || i >= c->height || j < 0 || j >= c->width)
                            continue;
                        if (x[(o * c->height + i) * c->width + j] > largest)
                            largest = x[(o * c->height + i) * c->width + j];
                    }
                y[(o * c->out_height + row) * c->out_width + column] = largest;
            }
}

/* Products of [heads, rows, terms] and [heads, terms, columns]; the right operand is counts or spikes. */
#define QSD_PRODUCT(NAME, TYPE, TERM)                                                                               \
    QSD_UNUSED static void NAME(int heads, int rows, int terms, int columns, const TYPE *a, const uint8_t *b,       \
                                int32_t *y)                                                                         \
    {                                                                                                               \
        for (int h = 0; h < heads; ++h)                                                                             \
            for (int i = 0; i < rows; ++i) {                                                                        \
                int32_t *target = y + (h * rows + i) * columns;                                                     \
                for (int j = 0; j < columns; ++j)                                                                   \
                    target[j] = 0;                                                                                  \
                for (int k = 0; k < terms; ++k) {                                                                   \
                    int32_t left = a[(h * rows + i) * terms + k];                                                   \
                    const uint8_t *right = b + (h * terms + k) * columns;                                           \
                    for (int j = 0; left && j < columns; ++j)                                                       \
                        target[j] += TERM(left, right[j]);                                                          \
                }                                                                                                   \
            }                                                                                                       \
    }

QSD_PRODUCT(qsd_product_counts, uint8_t, QSD_TIMES)
QSD_PRODUCT(qsd_query_counts, int32_t, QSD_TIMES)
QSD_PRODUCT(qsd_query_spikes, int32_t, QSD_GATED)

/* One step of a product of spikes: the left spikes add rows of the right sums, the right spikes add the left sums of
 * the steps before. Both sums are brought up to this step. */
QSD_UNUSED static void qsd_product_spikes(int heads, int rows, int terms, int columns, const uint8_t *a,
                                          const uint8_t *b, int32_t *left, int32_t *right, int32_t *y)
{
    for (int i = 0; i < heads * terms * columns; ++i)
        right[i] += b[i];
    for (int h = 0; h < heads; ++h)
        for (int i = 0; i < rows; ++i)
            for (int j = 0; j < columns; ++j) {
                int32_t sum = 0;
                for (int k = 0; k < terms; ++k) {
                    int at = (h * rows + i) * terms + k, of = (h * terms + k) * columns + j;
                    sum += QSD_GATED(right[of], a[at]) + QSD_GATED(left[at], b[of]);
                }
                y[(h * rows + i) * columns + j] = sum;
            }
    for (int i = 0; i < heads * rows * terms; ++i)
        left[i] += a[i];
}

/* Axes in another order; the strides are those of the input, by axis of the output. */
#define QSD_PERMUTE(NAME, TYPE)                                                                                     \
    QSD_UNUSED static void NAME(const int *size, const int *stride, const TYPE *x, TYPE *y)                         \
    {                                                                                                               \
        int at = 0;                                                                                                 \
        for (int a = 0; a < size[0]; ++a)                                                                           \
            for (int b = 0; b < size[1]; ++b)                                                                       \
                for (int c = 0; c < size[2]; ++c)                                                                   \
                    y[at++] = x[a * stride[0] + b * stride[1] + c * stride[2]];                                     \
    }

QSD_PERMUTE(qsd_permute_spikes, uint8_t)
QSD_PERMUTE(qsd_permute_integers, int32_t)
