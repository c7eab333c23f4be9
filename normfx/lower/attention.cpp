// Attention without a backward pass, on the CPU: softmax(scale q kᵀ + mask) v, a block of keys at a time.
//
// Each task is one head of one sequence and a range of its queries. For a block of keys it packs kᵀ and v once, computes
// scores of QUERIES queries, their exponentials relative to the largest score so far, and adds their product with v to
// the output, which is scaled where a larger score was met (Milakov and Gimelshein 2018; Dao et al. 2022). Sums and
// exponentials are float32 whatever the operands are.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <new>
#include <type_traits>
#include <vector>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float Vector __attribute__((vector_size(LANES * sizeof(float))));
typedef int32_t Integers __attribute__((vector_size(LANES * sizeof(int32_t))));

// Registers of a product's tile: ROWS × WIDE vectors of sums, WIDE vectors of a row of the right matrix, and one number
// of the left one, repeated.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int ROWS = 6, WIDE = 4;
#else
constexpr int ROWS = 4, WIDE = 2;
#endif
constexpr int QUERIES = 4 * ROWS;
constexpr int KEYS = 512;   // of a block at most
constexpr int DEPTH = 64;   // products that are added up one after another: the sums of more are added to each other
constexpr int FEW = 3;      // queries of a call that do not pay for packing
constexpr int CHUNK = 384;  // queries of a task at most
constexpr float INFINITE = std::numeric_limits<float>::infinity();

inline Vector load(const float* at) {
    Vector v;
    std::memcpy(&v, at, sizeof v);
    return v;
}

// 32 bits in each lane. Not `all`: numbers that are none would change their bits.
inline Vector repeated(const float* at) {
    int32_t bits;
    std::memcpy(&bits, at, sizeof bits);
    return (Vector)(Integers{} + bits);
}

inline void store(float* at, Vector v) { std::memcpy(at, &v, sizeof v); }

inline Vector all(float x) { return Vector{} + x; }

inline Vector multiply_add(Vector a, Vector b, Vector c) {
#if defined(__AVX512F__)
    return (Vector)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__) && defined(__AVX2__)
    return (Vector)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
    return (Vector)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + c;
#endif
}

// The larger number of each pair; b where either is NaN.
inline Vector larger(Vector a, Vector b) {
#if defined(__AVX512F__)
    return (Vector)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
    return (Vector)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return a > b ? a : b;
#endif
}

// eˣ for x ≤ 0, to 1e-7; 0 below -87. NaN stays.
inline Vector exponential(Vector x) {
    const Vector low = all(-87.0f), shift = all(12582912.0f);  // 1.5 · 2²³: adding it rounds to an integer
    x = larger(low, x);
    Vector n = multiply_add(x, all(1.44269504f), shift);
    Integers power = (Integers)n << 23;
    n -= shift;
    Vector r = multiply_add(n, all(-0.693145752f), x);  // ln 2 in two parts
    r = multiply_add(n, all(-1.42860677e-6f), r);
    Vector p = all(1.0f / 720);
    p = multiply_add(p, r, all(1.0f / 120));
    p = multiply_add(p, r, all(1.0f / 24));
    p = multiply_add(p, r, all(1.0f / 6));
    p = multiply_add(p, r, all(0.5f));
    p = multiply_add(p, r, all(1.0f));
    p = multiply_add(p, r, all(1.0f));
    Vector scaled = (Vector)((Integers)p + power);
    return x <= low ? Vector{} : (x == x ? scaled : x);
}

inline float sum(Vector v) {
    float total = 0;
    for (int i = 0; i < LANES; ++i) total += v[i];
    return total;
}

inline float largest(Vector v) {
    float most = v[0];
    for (int i = 1; i < LANES; ++i) most = v[i] > most ? v[i] : most;
    return most;
}

// What a product's operands consist of: words of 32 bits. SINGLE: a float32 number each. PAIR: two bfloat16 numbers, which
// are multiplied and added by one instruction, in float32.
enum Word { SINGLE, PAIR };
#if defined(__AVX512BF16__)
constexpr bool HAS_PAIRS = true;
#else
constexpr bool HAS_PAIRS = false;
#endif

template <Word W>
inline Vector multiplied(Vector a, Vector b, Vector c) {
#if defined(__AVX512BF16__)
    if constexpr (W == PAIR) return (Vector)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
#endif
    return multiply_add(a, b, c);
}

struct Half {  // bfloat16
    uint16_t bits;
};

inline float read(float x) { return x; }
inline float read(Half x) {
    uint32_t wide = uint32_t(x.bits) << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
}

inline Vector load(const Half* at) {
    typedef uint16_t Narrow __attribute__((vector_size(LANES * 2)));
    typedef uint32_t Bits __attribute__((vector_size(LANES * 4)));
    Narrow narrow;
    std::memcpy(&narrow, at, sizeof narrow);
    return (Vector)(__builtin_convertvector(narrow, Bits) << 16);
}

// The first `count` numbers; 0 beyond.
template <typename T>
inline Vector load_part(const T* at, int64_t count) {
    if (count >= LANES) return load(at);
    Vector v{};
    for (int64_t i = 0; i < count; ++i) v[i] = read(at[i]);
    return v;
}

// The first `count` numbers, at most LANES; bfloat16 ones rounded to the nearest, ties to even.
inline void store_part(float* at, Vector v, int64_t count) {
    if (count >= LANES) store(at, v);
    else std::memcpy(at, &v, count * sizeof(float));
}
inline void store_part(Half* at, Vector v, int64_t count) {
    typedef uint32_t Bits __attribute__((vector_size(LANES * 4)));
    typedef uint16_t Narrow __attribute__((vector_size(LANES * 2)));
    const Bits bits = (Bits)v, rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    const Narrow narrow = __builtin_convertvector(v == v ? rounded : Bits{} + 0x7fc0, Narrow);
    if (count >= LANES) std::memcpy(at, &narrow, sizeof narrow);
    else std::memcpy(at, &narrow, count * sizeof(Half));
}

// LANES words from `at`, of as many entries as there are; 0 beyond.
template <Word W, typename T>
inline Vector load_words(const T* at, int64_t entries) {
    if constexpr (W == SINGLE) return load_part(at, entries);
    Vector v{};
    if (entries >= 2 * LANES) std::memcpy(&v, at, sizeof v);
    else std::memcpy(&v, at, entries * sizeof(T));
    return v;
}

inline int64_t rounded_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Splits `count` vectors into groups of at most WIDE, as even as can be; the first vector of group i.
inline int64_t groups(int64_t count) { return (count + WIDE - 1) / WIDE; }
inline int64_t begin(int64_t count, int64_t i) {
    int64_t n = groups(count), least = count / n, more = count % n;
    return i * least + std::min(i, more);
}

// LANES × LANES numbers, rows to columns: each step interleaves rows of both halves.
inline void transpose(Vector (&r)[LANES]) {
    Vector t[LANES];
    for (int step = 1; step < LANES; step *= 2) {
        for (int i = 0; i < LANES / 2; ++i) {
            const Vector a = r[i], b = r[i + LANES / 2];
#if defined(__AVX512F__)
            const Integers low = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
            const Integers high = {8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
            t[2 * i] = (Vector)_mm512_permutex2var_ps((__m512)a, (__m512i)low, (__m512)b);
            t[2 * i + 1] = (Vector)_mm512_permutex2var_ps((__m512)a, (__m512i)high, (__m512)b);
#else
            for (int j = 0; j < LANES / 2; ++j) {
                t[2 * i][2 * j] = a[j], t[2 * i][2 * j + 1] = b[j];
                t[2 * i + 1][2 * j] = a[LANES / 2 + j], t[2 * i + 1][2 * j + 1] = b[LANES / 2 + j];
            }
#endif
        }
        for (int i = 0; i < LANES; ++i) r[i] = t[i];
    }
}

// rows × n vectors of `out` (row after row `out_stride` apart) = [out +] a b, where b has n vectors a row.
template <Word W, int M, int N, bool ADD>
inline void tile(const float* a, int64_t a_stride, const float* b, int64_t inner, float* out, int64_t out_stride,
                 float scale) {
    Vector sums[M][N];
    for (int i = 0; i < M; ++i)
        for (int j = 0; j < N; ++j) sums[i][j] = Vector{};
    for (int64_t k = 0; k < inner; ++k) {
        Vector row[N];
        for (int j = 0; j < N; ++j) row[j] = load(b + (k * N + j) * LANES);
        for (int i = 0; i < M; ++i) {
            const Vector x = repeated(a + i * a_stride + k);
            for (int j = 0; j < N; ++j) sums[i][j] = multiplied<W>(x, row[j], sums[i][j]);
        }
    }
    for (int i = 0; i < M; ++i)
        for (int j = 0; j < N; ++j) {
            float* at = out + i * out_stride + j * LANES;
            store(at, ADD ? multiply_add(sums[i][j], all(scale), load(at)) : sums[i][j] * scale);
        }
}

template <Word W, int M, bool ADD>
inline void of_width(int64_t n, const float* a, int64_t a_stride, const float* b, int64_t inner, float* out,
                     int64_t out_stride, float scale) {
    if (n == 1) tile<W, M, 1, ADD>(a, a_stride, b, inner, out, out_stride, scale);
    if constexpr (WIDE >= 4 || M <= ROWS)
        if (n == 2) tile<W, M, 2, ADD>(a, a_stride, b, inner, out, out_stride, scale);
    if constexpr (WIDE >= 4 && M <= ROWS) {
        if (n == 3) tile<W, M, 3, ADD>(a, a_stride, b, inner, out, out_stride, scale);
        if (n == 4) tile<W, M, 4, ADD>(a, a_stride, b, inner, out, out_stride, scale);
    }
}

// `rows` rows: as many at a time as there are registers for.
template <Word W, bool ADD>
void product(int64_t rows, int64_t n, const float* a, int64_t a_stride, const float* b, int64_t inner, float* out,
             int64_t out_stride, float scale) {
    int64_t i = 0;
    auto tiles = [&](auto height) {
        constexpr int M = decltype(height)::value;
        for (; i + M <= rows; i += M)
            of_width<W, M, ADD>(n, a + i * a_stride, a_stride, b, inner, out + i * out_stride, out_stride, scale);
    };
    if (n <= WIDE / 2) tiles(std::integral_constant<int, 2 * ROWS>());
    tiles(std::integral_constant<int, ROWS>());
    tiles(std::integral_constant<int, ROWS / 2>());
    tiles(std::integral_constant<int, 1>());
}

struct View {  // entries lie strides[0..2] apart along sequences, heads and tokens, and side by side in a token
    int64_t data, sequence, head, token;
};

// Entries → words.
template <Word W>
inline int64_t words(int64_t entries) {
    return W == PAIR ? (entries + 1) / 2 : entries;
}

struct Call {
    int64_t sequences, heads, key_heads, queries, keys, width, value_width;
    View q, k, v, out, mask;  // data 0: no mask
    int64_t mask_entry;       // what lies between a mask's entries for one query
    int64_t mask_is_float, causal, threads;
    int64_t pairs;  // whether bfloat16 operands are multiplied as pairs, not as float32 numbers
    View sums;                // log Σ exp of the scores, in float32; data 0: not wanted
    double scale;
};

template <typename T>
const T* row(const View& view, int64_t sequence, int64_t head, int64_t token) {
    return reinterpret_cast<const T*>(view.data) + sequence * view.sequence + head * view.head + token * view.token;
}

// Memory of one thread that stays for its next call.
struct Memory {
    float* at = nullptr;
    int64_t size = 0;

    float* of(int64_t wanted) {
        if (wanted > size) {
            std::free(at);
            size = rounded_up(wanted, 16);
            at = static_cast<float*>(std::aligned_alloc(64, size * sizeof(float)));
            if (!at) size = 0;
        }
        return at;
    }
    ~Memory() { std::free(at); }
};
thread_local Memory memory;

// What a mask does to LANES keys of QUERIES queries, unless it adds one number here and another one there.
enum Effect : uint8_t { ADDS, NOTHING, EXCLUDES };

// What one thread packed, and what it has computed of its task.
struct Scratch {
    float *keys, *values, *queries, *scores, *out, *most, *total;
    bool found;

    Scratch(const Call& c, int64_t chunk) {
        const int64_t columns = rounded_up(std::min<int64_t>(c.keys, KEYS), LANES);
        const int64_t deep = rounded_up(c.width, LANES), wide = rounded_up(c.value_width, LANES);
        const int64_t sizes[] = {columns * deep, columns * wide, chunk * deep, QUERIES * columns, chunk * wide, chunk,
                                 chunk};
        float** parts[] = {&keys, &values, &queries, &scores, &out, &most, &total};
        int64_t all = 0;
        for (int64_t size : sizes) all += rounded_up(size, 16);
        float* at = memory.of(all);
        found = at != nullptr;
        for (int i = 0; found && i < 7; ++i) *parts[i] = at, at += rounded_up(sizes[i], 16);
    }
};

// kᵀ: for each group of vectors of keys, a row of them for each word of a key. Keys beyond `count` are 0.
template <Word W, typename T>
void pack_keys(const T* from, int64_t stride, int64_t count, int64_t width, float* to) {
    constexpr int64_t EACH = W == PAIR ? 2 : 1;
    const int64_t vectors = rounded_up(count, LANES) / LANES, deep = words<W>(width);
    for (int64_t g = 0; g < groups(vectors); ++g) {
        const int64_t first = begin(vectors, g), n = begin(vectors, g + 1) - first;
        float* panel = to + first * LANES * deep;
        for (int64_t j = 0; j < n; ++j) {
            const int64_t key = (first + j) * LANES, present = std::min<int64_t>(LANES, count - key);
            for (int64_t d = 0; d < deep; d += LANES) {
                Vector r[LANES];
                for (int i = 0; i < LANES; ++i) {
                    const T* at = from + (key + i) * stride + d * EACH;
                    r[i] = i < present ? load_words<W>(at, width - d * EACH) : Vector{};
                }
                transpose(r);
                for (int64_t e = 0; e < std::min<int64_t>(LANES, deep - d); ++e)
                    store(panel + ((d + e) * n + j) * LANES, r[e]);
            }
        }
    }
}

// v: for each group of vectors of its entries, a row of them for each key, or for two. Entries beyond `width` are 0.
template <Word W, typename T>
void pack_values(const T* from, int64_t stride, int64_t count, int64_t width, float* to) {
    constexpr int64_t EACH = W == PAIR ? 2 : 1;
    const int64_t vectors = rounded_up(width, LANES) / LANES;
    for (int64_t g = 0; g < groups(vectors); ++g) {
        const int64_t first = begin(vectors, g), n = begin(vectors, g + 1) - first;
        float* panel = to + first * LANES * words<W>(count);
        for (int64_t key = 0; key < count; key += EACH) {
            for (int64_t j = 0; j < n; ++j) {
                const int64_t entry = (first + j) * LANES;
                const T* at = from + key * stride + entry;
                Vector v = load_part(at, width - entry);
                if constexpr (W == PAIR) {  // bfloat16 numbers are the upper halves of what is loaded
                    const Vector next = key + 1 < count ? load_part(at + stride, width - entry) : Vector{};
                    v = (Vector)(((Integers)v >> 16 & 0xffff) | (Integers)next);
                }
                store(panel + (key / EACH * n + j) * LANES, v);
            }
        }
    }
}

template <Word W, typename T>
void pack_rows(const T* from, int64_t stride, int64_t count, int64_t width, float* to) {
    const int64_t deep = words<W>(width);
    for (int64_t i = 0; i < count; ++i, from += stride, to += deep) {
        if constexpr (W == PAIR) {
            to[deep - 1] = 0.0f;
            std::memcpy(to, from, width * sizeof(T));
        } else {
            for (int64_t e = 0; e < width; e += LANES) store_part(to + e, load_part(from + e, width - e), width - e);
        }
    }
}

// A row of float32 numbers → pairs of bfloat16 ones, at the same indices of entries.
inline void to_pairs(float* row, int64_t first, int64_t columns) {
#if defined(__AVX512BF16__)
    uint16_t* narrow = reinterpret_cast<uint16_t*>(row);
    for (int64_t j = first; j < first + columns; j += LANES) {
        const __m256bh rounded = _mm512_cvtneps_pbh((__m512)load(row + j));
        std::memcpy(narrow + j, &rounded, sizeof rounded);
    }
#endif
}

// What the mask adds to a query's scores of `count` keys, at most LANES, from `key` on; 0 beyond.
template <typename T>
Vector mask_of(const Call& c, int64_t sequence, int64_t head, int64_t query, int64_t key, int64_t count) {
    const auto read_at = [&](auto* at) {
        at += key * c.mask_entry;
        if (c.mask_entry == 1) return load_part(at, count);
        Vector added{};
        for (int64_t e = 0; e < std::min<int64_t>(count, LANES); ++e) added[e] = read(at[e * c.mask_entry]);
        return added;
    };
    if (c.mask_is_float) return read_at(row<float>(c.mask, sequence, head, query));
    return read_at(row<T>(c.mask, sequence, head, query));
}

// The effects of a mask, for each QUERIES queries and LANES keys; one for all sequences, heads or queries that share it.
struct Effects {
    int64_t sequences, heads, rows, columns;
    std::vector<uint8_t> found;

    explicit Effects(const Call& c)
        : sequences(c.mask.sequence ? c.sequences : 1), heads(c.mask.head ? c.heads : 1),
          rows(c.mask.token ? (c.queries + QUERIES - 1) / QUERIES : 1), columns(rounded_up(c.keys, LANES) / LANES) {
        if (c.mask.data) found.resize(sequences * heads * rows * columns);
    }

    int64_t count() const { return found.empty() ? 0 : sequences * heads * rows; }

    const uint8_t* of(int64_t sequence, int64_t head, int64_t block) const {
        return found.data() + (((sequences > 1 ? sequence : 0) * heads + (heads > 1 ? head : 0)) * rows + (rows > 1 ? block : 0)) * columns;
    }

    template <typename T>
    void find(const Call& c, int64_t i) {
        const int64_t block = i % rows, head = i / rows % heads, sequence = i / rows / heads;
        const int64_t first = block * QUERIES, last = c.mask.token ? std::min(first + QUERIES, c.queries) : first + 1;
        uint8_t* effect = found.data() + i * columns;
        for (int64_t j = 0; j < columns; ++j) {
            const int64_t keys = std::min<int64_t>(LANES, c.keys - j * LANES);
            Integers zero = ~Integers{}, infinite = zero;
            for (int64_t query = first; query < last; ++query) {
                const Vector x = mask_of<T>(c, sequence, head, query, j * LANES, keys);
                zero &= x == Vector{}, infinite &= x == all(-INFINITE);
            }
            bool nothing = true, excludes = true;
            for (int64_t e = 0; e < keys; ++e) nothing &= zero[e] != 0, excludes &= infinite[e] != 0;
            effect[j] = nothing ? NOTHING : excludes ? EXCLUDES : ADDS;
        }
    }
};

template <typename T, Word W>
class Task {
    const Call& c;
    Scratch& s;
    const Effects& effects;
    const int64_t sequence, head, first, count;  // of the queries
    const int64_t deep = words<W>(c.width), wide = rounded_up(c.value_width, LANES);

    // Scores of query i of the task, `columns` from `key` on → exponentials relative to the largest so far; what was
    // added up before is scaled.
    void soften(int64_t i, float* scores, int64_t key, int64_t columns, const uint8_t* effect) {
        const int64_t query = first + i;
        const int64_t present = std::max<int64_t>(std::min(columns, (c.causal ? std::min(c.keys, query + 1) : c.keys) - key), 0);
        Vector most = all(-INFINITE);
        for (int64_t j = 0; j < columns; j += LANES) {
            const int64_t here = std::min<int64_t>(LANES, present - j);
            const uint8_t does = effect ? effect[j / LANES] : uint8_t(NOTHING);
            Vector x = load(scores + j);
            if (does != NOTHING || here < LANES) {
                if (does == ADDS && here > 0) x += mask_of<T>(c, sequence, head, query, key + j, here);
                if (does == EXCLUDES) x = all(-INFINITE);
                for (int64_t e = std::max<int64_t>(here, 0); e < LANES; ++e) x[e] = -INFINITE;
                store(scores + j, x);
            }
            most = larger(x, most);
        }
        const float top = std::max(largest(most), s.most[i]);
        const Vector from = all(top == -INFINITE ? 0.0f : top);
        Vector total{};
        for (int64_t j = 0; j < columns; j += LANES) {
            const Vector x = exponential(load(scores + j) - from);
            store(scores + j, x), total += x;
        }
        if (s.total[i] != 0.0f && top != s.most[i]) {
            const float before = exponential(all(s.most[i]) - from)[0];
            float* out = s.out + i * wide;
            for (int64_t e = 0; e < wide; e += LANES) store(out + e, load(out + e) * before);
            s.total[i] *= before;
        }
        s.total[i] += sum(total);
        s.most[i] = top;
    }

    // Queries i to i + rows of the task and packed keys: those of the first to the last group with a key that counts.
    void attend(int64_t i, int64_t rows, int64_t key, int64_t keys) {
        const int64_t vectors = rounded_up(keys, LANES) / LANES;
        const uint8_t* effect = c.mask.data ? effects.of(sequence, head, (first + i) / QUERIES) + key / LANES : nullptr;
        int64_t to = c.causal ? std::min(vectors, rounded_up(std::max<int64_t>(first + i + rows - key, 0), LANES) / LANES) : vectors;
        int64_t from = 0;
        if (effect) {
            while (from < to && effect[from] == EXCLUDES) ++from;
            while (to > from && effect[to - 1] == EXCLUDES) --to;
        }
        if (from == to) return;
        int64_t g = 0;
        while (begin(vectors, g + 1) <= from) ++g;
        from = begin(vectors, g);
        int64_t filled = from;
        for (; filled < to; ++g) {
            const int64_t n = begin(vectors, g + 1) - filled;
            for (int64_t d = 0; d < deep; d += DEPTH) {
                const auto multiply = d ? product<W, true> : product<W, false>;
                multiply(rows, n, s.queries + i * deep + d, deep, s.keys + (filled * deep + d * n) * LANES,
                         std::min<int64_t>(DEPTH, deep - d), s.scores + filled * LANES, vectors * LANES,
                         float(c.scale));
            }
            filled += n;
        }
        const int64_t columns = (filled - from) * LANES, last = words<W>(std::min(filled * LANES, keys));
        for (int64_t r = 0; r < rows; ++r) {
            float* scores = s.scores + r * vectors * LANES;
            soften(i + r, scores + from * LANES, key + from * LANES, columns, effect ? effect + from : nullptr);
            if (W == PAIR) to_pairs(scores, from * LANES, columns);
        }
        for (int64_t at = words<W>(from * LANES); at < last; at += DEPTH) {
            const int64_t inner = std::min<int64_t>(DEPTH, last - at), pieces = wide / LANES;
            for (int64_t p = 0; p < groups(pieces); ++p) {
                const int64_t piece = begin(pieces, p), n = begin(pieces, p + 1) - piece;
                const float* values = s.values + (piece * words<W>(keys) + at * n) * LANES;
                product<W, true>(rows, n, s.scores + at, vectors * LANES, values, inner,
                                 s.out + i * wide + piece * LANES, wide, 1.0f);
            }
        }
    }

    // One query and the keys as they lie in memory, without those that the mask excludes.
    void attend_one(int64_t i, int64_t key, int64_t keys) {
        const int64_t vectors = rounded_up(keys, LANES) / LANES, key_head = head / (c.heads / c.key_heads);
        const uint8_t* effect = c.mask.data ? effects.of(sequence, head, (first + i) / QUERIES) + key / LANES : nullptr;
        const float* query = s.queries + i * c.width;
        auto counts = [&](int64_t j) { return !effect || effect[j] != EXCLUDES; };
        for (int64_t j = 0; j < vectors; ++j) {
            Vector sums[LANES];
            if (!counts(j)) continue;
            for (int k = 0; k < LANES; ++k) {
                sums[k] = Vector{};
                if (j * LANES + k >= keys) continue;
                const T* at = row<T>(c.k, sequence, key_head, key + j * LANES + k);
                for (int64_t d = 0; d < c.width; d += LANES)
                    sums[k] = multiply_add(load_part(query + d, c.width - d), load_part(at + d, c.width - d), sums[k]);
            }
            transpose(sums);
            for (int half = LANES / 2; half; half /= 2)
                for (int k = 0; k < half; ++k) sums[k] += sums[k + half];
            store(s.scores + j * LANES, sums[0] * float(c.scale));
        }
        soften(i, s.scores, key, vectors * LANES, effect);
        float* out = s.out + i * wide;
        for (int64_t e = 0; e < c.value_width; e += WIDE * LANES) {
            for (int64_t j = 0; j < vectors; ++j) {
                if (!counts(j)) continue;
                Vector sums[WIDE] = {};
                for (int64_t k = j * LANES; k < std::min((j + 1) * LANES, keys); ++k) {
                    const T* at = row<T>(c.v, sequence, key_head, key + k) + e;
                    const Vector weight = all(s.scores[k]);
                    for (int n = 0; n < WIDE && e + n * LANES < c.value_width; ++n)
                        sums[n] = multiply_add(weight, load_part(at + n * LANES, c.value_width - e - n * LANES), sums[n]);
                }
                for (int n = 0; n < WIDE && e + n * LANES < c.value_width; ++n)
                    store(out + e + n * LANES, load(out + e + n * LANES) + sums[n]);
            }
        }
    }

  public:
    Task(const Call& call, Scratch& scratch, const Effects& effects, int64_t sequence, int64_t head, int64_t first,
         int64_t count)
        : c(call), s(scratch), effects(effects), sequence(sequence), head(head), first(first), count(count) {}

    void run() {
        const int64_t key_head = head / (c.heads / c.key_heads);
        pack_rows<W>(row<T>(c.q, sequence, head, first), c.q.token, count, c.width, s.queries);
        std::fill(s.most, s.most + count, -INFINITE);
        std::fill(s.total, s.total + count, 0.0f);
        std::memset(s.out, 0, count * wide * sizeof(float));
        const int64_t reached = c.causal ? std::min(c.keys, first + count) : c.keys;
        const int64_t blocks = (reached + KEYS - 1) / KEYS, each = rounded_up((reached + blocks - 1) / blocks, LANES);
        for (int64_t key = 0; key < reached; key += each) {
            const int64_t keys = std::min(each, reached - key);
            if constexpr (W == SINGLE) {
                if (c.queries <= FEW) {
                    for (int64_t i = 0; i < count; ++i) attend_one(i, key, keys);
                    continue;
                }
            }
            pack_keys<W>(row<T>(c.k, sequence, key_head, key), c.k.token, keys, c.width, s.keys);
            pack_values<W>(row<T>(c.v, sequence, key_head, key), c.v.token, keys, c.value_width, s.values);
            for (int64_t i = 0; i < count; i += QUERIES) attend(i, std::min<int64_t>(QUERIES, count - i), key, keys);
        }
        for (int64_t i = 0; i < count; ++i) {
            T* to = const_cast<T*>(row<T>(c.out, sequence, head, first + i));
            const float total = s.total[i], inverse = total == 0.0f ? 0.0f : 1.0f / total;
            for (int64_t e = 0; e < c.value_width; e += LANES)
                store_part(to + e, load(s.out + i * wide + e) * inverse, c.value_width - e);
            if (c.sums.data)
                *const_cast<float*>(row<float>(c.sums, sequence, head, first + i)) =
                    total == 0.0f ? 0.0f : s.most[i] + std::log(total);
        }
    }
};

template <typename T, Word W>
bool attend(const Call& c) {
    const int64_t heads = c.sequences * c.heads;
    int64_t parts = (c.queries + CHUNK - 1) / CHUNK;
    while (heads * parts < 4 * c.threads && (heads * parts) % c.threads && c.queries / (parts + 1) >= 2 * QUERIES) ++parts;
    const int64_t chunk = rounded_up((c.queries + parts - 1) / parts, QUERIES);
    parts = (c.queries + chunk - 1) / chunk;
    Effects effects(c);
    bool failed = false;
#pragma omp parallel num_threads(c.threads)
    {
        Scratch scratch(c, chunk);
        if (!scratch.found) {
#pragma omp atomic write
            failed = true;
        }
#pragma omp for
        for (int64_t i = 0; i < effects.count(); ++i) effects.find<T>(c, i);
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < heads * parts; ++task) {
            if (!scratch.found) continue;
            const int64_t head = task / parts, first = (parts - 1 - task % parts) * chunk;
            Task<T, W>(c, scratch, effects, head / c.heads, head % c.heads, first, std::min(chunk, c.queries - first)).run();
        }
    }
    return !failed;
}

}  // namespace

// Whether this processor has an instruction for pairs of bfloat16 numbers.
extern "C" int64_t normfx_multiplies_pairs() { return HAS_PAIRS; }

// Returns 1 where memory for the packed operands could not be had; the output is then undefined.
extern "C" int64_t normfx_attention(const Call* call, int64_t is_float) {
    try {
        if (is_float) return !attend<float, SINGLE>(*call);
        if constexpr (HAS_PAIRS)
            if (call->pairs && call->queries > FEW) return !attend<Half, PAIR>(*call);
        return !attend<Half, SINGLE>(*call);
    } catch (const std::bad_alloc&) {
        return 1;
    }
}
