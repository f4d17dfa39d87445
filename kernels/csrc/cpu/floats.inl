// Floating point that every op needs: conversions from and to 16 bits, and the small product C += A
// . B.

constexpr int PANEL = 16;               // columns of a panel: what one row of B holds side by side
constexpr int VECTORS = PANEL / LANES;  // in registers
constexpr int BLOCK = 256;  // K is summed in blocks of this many: less rounding than one long sum,
                            // and a panel fits into L1

// Scratch memory of one call.
template <class T>
struct Scratch {
    explicit Scratch(int64_t count)
        : data(static_cast<T*>(allocate(static_cast<size_t>(count) * sizeof(T)))) {}
    ~Scratch() { release(data); }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    T* const data;
};

// Hands out parts of a worker's scratch, aligned to 64 bytes. Without a base it only adds up how
// much is needed.
struct Carver {
    char* base = nullptr;
    size_t used = 0;
    template <class T>
    T* take(int64_t count) {
        char* begin = base ? base + used : nullptr;
        used += (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
        return reinterpret_cast<T*>(begin);
    }
};

// Bytes that a worker's parts need, for any struct of parts.
template <class T, class... Sizes>
size_t scratch_bytes(Sizes... sizes) {
    Carver carver;
    T(carver, sizes...);
    return carver.used;
}

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// ---- conversions --------------------------------------------------------------------------------

inline int64_t size_of(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }

inline const char* at(const void* base, Dtype dtype, int64_t index) {
    return static_cast<const char*>(base) + index * size_of(dtype);
}

template <Dtype D>
F load_as(const void* p) {
    if constexpr (D == Dtype::f32)
        return load(static_cast<const float*>(p));
    else if constexpr (D == Dtype::f16)
        return load_half(static_cast<const uint16_t*>(p));
    else
        return load_bf16(static_cast<const uint16_t*>(p));
}

// bfloat16 by adding half of the last place and cutting off, half to even; a NaN keeps its sign and
// becomes quiet.
inline I to_bf16(F x) {
    const I b = bits(x), magnitude = and_(b, splat_int(0x7FFFFFFF));
    const I odd = and_(shift_right<16>(b), splat_int(1));
    const I rounded = shift_right<16>(add_int(b, add_int(odd, splat_int(0x7FFF))));
    // All ones where the magnitude is beyond infinity's: the difference is negative there.
    const I nan = shift_right_signed<31>(sub_int(splat_int(0x7F800000), magnitude));
    const I quiet = shift_right<16>(or_(b, splat_int(0x00400000)));
    return or_(and_(nan, quiet), andnot(nan, rounded));
}

template <Dtype D>
void store_as(void* p, F x) {
    if constexpr (D == Dtype::f32)
        store(static_cast<float*>(p), x);
    else if constexpr (D == Dtype::f16)
        store_half(static_cast<uint16_t*>(p), x);
    else
        store_u16(static_cast<uint16_t*>(p), to_bf16(x));
}

template <Dtype D>
void to_floats(const void* source, int64_t count, float* result) {
    constexpr int64_t size = D == Dtype::f32 ? 4 : 2;
    const char* p = static_cast<const char*>(source);
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) store(result + i, load_as<D>(p + i * size));
    if (i < count) {
        float part[LANES] = {};
        std::memcpy(part, p + i * size, static_cast<size_t>((count - i) * size));
        store(part, load_as<D>(part));
        std::memcpy(result + i, part, static_cast<size_t>(count - i) * 4);
    }
}

inline void to_floats(Dtype dtype, const void* source, int64_t count, float* result) {
    if (dtype == Dtype::f32)
        std::memcpy(result, source, static_cast<size_t>(count) * 4);
    else if (dtype == Dtype::f16)
        to_floats<Dtype::f16>(source, count, result);
    else
        to_floats<Dtype::bf16>(source, count, result);
}

template <Dtype D>
void from_floats(const float* source, int64_t count, void* result) {
    constexpr int64_t size = D == Dtype::f32 ? 4 : 2;
    char* p = static_cast<char*>(result);
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) store_as<D>(p + i * size, load(source + i));
    if (i < count) {
        float part[LANES] = {};
        std::memcpy(part, source + i, static_cast<size_t>(count - i) * 4);
        store_as<D>(part, load(part));
        std::memcpy(p + i * size, part, static_cast<size_t>((count - i) * size));
    }
}

inline void from_floats(Dtype dtype, const float* source, int64_t count, void* result) {
    if (dtype == Dtype::f32)
        std::memcpy(result, source, static_cast<size_t>(count) * 4);
    else if (dtype == Dtype::f16)
        from_floats<Dtype::f16>(source, count, result);
    else
        from_floats<Dtype::bf16>(source, count, result);
}

// `rows` rows of PANEL numbers, of which only the first `width` exist in the source, `stride`
// numbers apart -> (rows, PANEL) floats.
template <Dtype D>
void to_panel(const void* source, int64_t stride, int64_t width, int64_t rows, float* panel) {
    const char* p = static_cast<const char*>(source);
    for (int64_t k = 0; k < rows; ++k, p += stride * (D == Dtype::f32 ? 4 : 2), panel += PANEL) {
        if (width == PANEL) {
            for (int n = 0; n < PANEL; n += LANES)
                store(panel + n, load_as<D>(p + n * (D == Dtype::f32 ? 4 : 2)));
        } else {
            to_floats<D>(p, width, panel);
            for (int64_t n = width; n < PANEL; ++n) panel[n] = 0.0f;
        }
    }
}

inline void to_panel(Dtype dtype, const void* source, int64_t stride, int64_t width, int64_t rows,
                     float* panel) {
    if (dtype == Dtype::f32)
        to_panel<Dtype::f32>(source, stride, width, rows, panel);
    else if (dtype == Dtype::f16)
        to_panel<Dtype::f16>(source, stride, width, rows, panel);
    else
        to_panel<Dtype::bf16>(source, stride, width, rows, panel);
}

// ---- C (rows, PANEL) += A (rows, k) . B (k, PANEL) ----------------------------------------------

// A row's sums are added in the order of k and then to C, however many rows go together: a token's
// result does not depend on its company.
template <int R>
void fma_tile(const float* a, int64_t lda, const float* b, int64_t k, float* c, int64_t ldc) {
    F sum[R][VECTORS];
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < VECTORS; ++v) sum[r][v] = zero();
    for (int64_t i = 0; i < k; ++i) {
        F column[VECTORS];
        for (int v = 0; v < VECTORS; ++v) column[v] = load(b + i * PANEL + v * LANES);
        for (int r = 0; r < R; ++r) {
            const F factor = splat(a[r * lda + i]);
            for (int v = 0; v < VECTORS; ++v) sum[r][v] = fma(factor, column[v], sum[r][v]);
        }
    }
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < VECTORS; ++v)
            store(c + r * ldc + v * LANES, add(load(c + r * ldc + v * LANES), sum[r][v]));
}

template <int R>
void fma_rest(int64_t rows, const float* a, int64_t lda, const float* b, int64_t k, float* c,
              int64_t ldc) {
    if constexpr (R > 0) {
        if (rows == R)
            fma_tile<R>(a, lda, b, k, c, ldc);
        else
            fma_rest<R - 1>(rows, a, lda, b, k, c, ldc);
    }
}

inline void fma_rows(int64_t rows, const float* a, int64_t lda, const float* b, int64_t k, float* c,
                     int64_t ldc) {
    int64_t r = 0;
    for (; r + FMA_ROWS <= rows; r += FMA_ROWS)
        fma_tile<FMA_ROWS>(a + r * lda, lda, b, k, c + r * ldc, ldc);
    fma_rest<FMA_ROWS - 1>(rows - r, a + r * lda, lda, b, k, c + r * ldc, ldc);
}
