/* GroupNorm (Wu & He 2018) and, after it, SiLU, in one pass over memory each way; see group_norm.py.

   Images lie as (N, P, C): P pixels, then C channels. Each image is one thread's, so no result depends on how many
   threads there are. `half` says that x, y and their gradients are bfloat16; all arithmetic is float32, and sums over
   pixels are float64 from block to block of 32. What is inlined with a constant `half` and `silu` becomes a loop of
   its own, which compilers make vectors of, as the innermost loops run over channels.                              */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define BLOCK 32
#define WITH_CONSTANTS(function, ...)                                                                   \
    (half ? (silu ? function(__VA_ARGS__, 1, 1) : function(__VA_ARGS__, 1, 0))                          \
          : (silu ? function(__VA_ARGS__, 0, 1) : function(__VA_ARGS__, 0, 0)))

INLINE float load(const void *p, long i, int half) {
    if (!half) return ((const float *)p)[i];
    uint32_t bits = (uint32_t)((const uint16_t *)p)[i] << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

INLINE void store(void *p, long i, float value, int half) {
    if (!half) {
        ((float *)p)[i] = value;
        return;
    }
    uint32_t bits;
    memcpy(&bits, &value, 4);
    uint32_t nearest = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16; /* ties to even */
    ((uint16_t *)p)[i] = (uint16_t)(value != value ? 0x7fc0 : nearest);
}

/* exp(x) = 2^n exp(r), |r| <= log(2) / 2, where the Taylor series to r^7 / 7! is within 6e-9 of it. */
INLINE float exponential(float x) {
    const float shift = 12582912.0f; /* 1.5 * 2^23: what is added to it is rounded to a whole number */
    uint32_t bits;
    memcpy(&bits, &x, 4); /* beyond 87 either way the magnitude is cut; as integers, which all compilers do fast */
    uint32_t magnitude = bits & 0x7fffffff;
    magnitude = magnitude < 0x42ae0000 ? magnitude : 0x42ae0000;
    bits = (bits & 0x80000000) | magnitude;
    memcpy(&x, &bits, 4);
    float shifted = x * 1.44269504f + shift, n = shifted - shift;
    float r = (x - n * 0.693145752f) - n * 1.42860677e-6f;
    float p = 1.0f / 5040;
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    memcpy(&bits, &shifted, 4);
    bits = (bits << 23) + 0x3f800000; /* the low bits of `shifted` are n */
    float power;
    memcpy(&power, &bits, 4);
    return p * power;
}

INLINE float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

/* scale and shift of each channel, so that the normed value of x + extra is scale * x + shift */
INLINE void affine(long C, long G, const float *extra, const float *mean, const float *rstd, const float *gamma,
                   const float *beta, float *scale, float *shift) {
    for (long c = 0; c < C; c++) {
        long g = c / (C / G);
        scale[c] = gamma[c] * rstd[g];
        shift[c] = beta[c] + ((extra ? extra[c] : 0.0f) - mean[g]) * scale[c];
    }
}

/* total[c] = sum over pixels of x - centre, or of its square */
INLINE void sums(const void *restrict x, long P, long C, const float *restrict centre, float *restrict block,
                 double *restrict total, int half, int squared) {
    for (long c = 0; c < C; c++) total[c] = 0;
    for (long begin = 0; begin < P; begin += BLOCK) {
        long end = begin + BLOCK < P ? begin + BLOCK : P;
        for (long c = 0; c < C; c++) block[c] = 0;
        for (long p = begin; p < end; p++)
            for (long c = 0; c < C; c++) {
                float d = load(x, p * C + c, half) - centre[c];
                block[c] += squared ? d * d : d;
            }
        for (long c = 0; c < C; c++) total[c] += block[c];
    }
}

INLINE double mean_of_group(const double *total, long g, long P, long C, long G) {
    double sum = 0;
    for (long c = g * (C / G); c < (g + 1) * (C / G); c++) sum += total[c];
    return sum / ((double)P * (C / G));
}

/* First the mean, then the squares of what is left: a large mean takes no digits from a small variance. */
INLINE void moments(const void *x, long P, long C, long G, const float *extra, float eps, float *mean, float *rstd,
                    float *block, double *total, float *centre, int half) {
    for (long c = 0; c < C; c++) centre[c] = extra ? -extra[c] : 0.0f;
    sums(x, P, C, centre, block, total, half, 0);
    for (long g = 0; g < G; g++) mean[g] = (float)mean_of_group(total, g, P, C, G);
    for (long c = 0; c < C; c++) centre[c] += mean[c / (C / G)];
    sums(x, P, C, centre, block, total, half, 1);
    for (long g = 0; g < G; g++) rstd[g] = (float)(1.0 / sqrt(mean_of_group(total, g, P, C, G) + eps));
}

INLINE void forward(const void *restrict x, const float *extra, const float *gamma, const float *beta,
                    void *restrict y, float *mean, float *rstd, long P, long C, long G, float eps, float *work,
                    int half, int silu) {
    float *restrict scale = work, *restrict shift = work + C;
    moments(x, P, C, G, extra, eps, mean, rstd, scale, (double *)(work + 2 * C), shift, half);
    affine(C, G, extra, mean, rstd, gamma, beta, scale, shift);
    for (long p = 0; p < P; p++)
        for (long c = 0; c < C; c++) {
            float h = scale[c] * load(x, p * C + c, half) + shift[c];
            store(y, p * C + c, silu ? h * sigmoid(h) : h, half);
        }
}

/* With u = x + extra normed without gamma and beta, s1 = sum of dh, s2 = sum of dh u (over pixels, by channel), and
   P1, P2 the means over a group of gamma s1 and gamma s2:  dx = rstd (gamma dh - P1 - u P2). */
INLINE void backward(const void *restrict dy, const void *restrict x, const float *extra, const float *gamma, const float *beta,
                     const float *mean, const float *rstd, void *restrict dx, float *dextra, float *dgamma,
                     float *dbeta, long P, long C, long G, float *work, float *restrict dh, int half, int silu) {
    float *restrict scale = work, *restrict shift = work + C, *restrict a = work + 2 * C, *restrict b = work + 3 * C;
    float *restrict of_x = work + 4 * C, *restrict constant = work + 5 * C;
    double *restrict s1 = (double *)(work + 6 * C), *restrict s2 = (double *)(work + 8 * C);
    affine(C, G, extra, mean, rstd, gamma, beta, scale, shift);
    for (long c = 0; c < C; c++) s1[c] = s2[c] = 0;
    for (long begin = 0; begin < P; begin += BLOCK) {
        long end = begin + BLOCK < P ? begin + BLOCK : P;
        for (long c = 0; c < C; c++) a[c] = b[c] = 0;
        for (long p = begin; p < end; p++)
            for (long c = 0; c < C; c++) {
                float value = load(x, p * C + c, half), d = load(dy, p * C + c, half);
                if (silu) {
                    float h = scale[c] * value + shift[c], s = sigmoid(h);
                    d *= s * (1.0f + h * (1.0f - s));
                }
                dh[p * C + c] = d;
                a[c] += d;
                b[c] += d * value;
            }
        for (long c = 0; c < C; c++) {
            s1[c] += a[c];
            s2[c] += b[c];
        }
    }
    for (long g = 0; g < G; g++) {
        long first = g * (C / G), after = first + C / G;
        double p1 = 0, p2 = 0, count = (double)P * (C / G);
        for (long c = first; c < after; c++) { /* s2 so far is of x itself */
            s2[c] = (s2[c] + ((extra ? extra[c] : 0.0f) - mean[g]) * s1[c]) * rstd[g];
            p1 += gamma[c] * s1[c] / count;
            p2 += gamma[c] * s2[c] / count;
        }
        for (long c = first; c < after; c++) {
            dbeta[c] = (float)s1[c];
            dgamma[c] = (float)s2[c];
            of_x[c] = (float)(-p2 * rstd[g] * rstd[g]);
            constant[c] = (float)(-p1 * rstd[g]) + of_x[c] * ((extra ? extra[c] : 0.0f) - mean[g]);
        }
    }
    for (long c = 0; c < C; c++) s1[c] = 0;
    for (long begin = 0; begin < P; begin += BLOCK) {
        long end = begin + BLOCK < P ? begin + BLOCK : P;
        for (long c = 0; c < C; c++) a[c] = 0;
        for (long p = begin; p < end; p++)
            for (long c = 0; c < C; c++) {
                float d = scale[c] * dh[p * C + c] + of_x[c] * load(x, p * C + c, half) + constant[c];
                a[c] += d;
                store(dx, p * C + c, d, half);
            }
        for (long c = 0; c < C; c++) s1[c] += a[c];
    }
    if (dextra)
        for (long c = 0; c < C; c++) dextra[c] = (float)s1[c];
}

/* x, y (N, P, C); extra (N, C) or none; gamma, beta (C); mean, rstd (N, G). Returns 0, or 1 for want of memory. */
int group_norm_forward(const char *x, const float *extra, const float *gamma, const float *beta, char *y, float *mean,
                       float *rstd, long N, long P, long C, long G, float eps, int half, int silu, int threads) {
    int failed = 0;
    long bytes = P * C * (half ? 2 : 4);
#pragma omp parallel num_threads(threads)
    {
        float *work = malloc(4 * C * sizeof(float));
        if (!work) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(static)
        for (long n = 0; n < N; n++) {
            if (!work) continue;
            const float *own = extra ? extra + n * C : 0;
            const char *in = x + n * bytes;
            char *out = y + n * bytes;
            float *m = mean + n * G, *r = rstd + n * G;
            WITH_CONSTANTS(forward, in, own, gamma, beta, out, m, r, P, C, G, eps, work);
        }
        free(work);
    }
    return failed;
}

/* dextra, dgamma, dbeta (N, C): what each image adds; dextra may be none. */
int group_norm_backward(const char *dy, const char *x, const float *extra, const float *gamma, const float *beta,
                        const float *mean, const float *rstd, char *dx, float *dextra, float *dgamma, float *dbeta,
                        long N, long P, long C, long G, int half, int silu, int threads) {
    int failed = 0;
    long bytes = P * C * (half ? 2 : 4);
#pragma omp parallel num_threads(threads)
    {
        float *work = malloc((10 * C + P * C) * sizeof(float));
        if (!work) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(static)
        for (long n = 0; n < N; n++) {
            if (!work) continue;
            const float *own = extra ? extra + n * C : 0, *m = mean + n * G, *r = rstd + n * G;
            const char *from = dy + n * bytes, *in = x + n * bytes;
            char *out = dx + n * bytes;
            float *de = dextra ? dextra + n * C : 0, *dg = dgamma + n * C, *db = dbeta + n * C, *dh = work + 10 * C;
            WITH_CONSTANTS(backward, from, in, own, gamma, beta, m, r, out, de, dg, db, P, C, G, work, dh);
        }
        free(work);
    }
    return failed;
}
