// Detects whether the memory of CPU tensors was written, by whatever means.
//
// A block is the memory of one tensor. It gets a new epoch, unlike any before, whenever a change of its contents is found:
// what was computed from a block is true as long as the epoch is the one at which it was computed, whoever looked meanwhile.
//
// Linux 6.7 and newer tell which pages were written since they were last protected (userfaultfd with asynchronous write
// protection, read and renewed by PAGEMAP_SCAN). Only whole pages inside a block are watched in this way; its ends share
// pages with other memory, so their contents are hashed. Where the kernel does not help, and for memory that other
// processes or devices may write, the whole contents are hashed.
//
// All functions are called with Python's lock held: they are short, and no other thread may free what they read. The mutex
// is for interpreters without that lock.

#include <c10/core/StorageImpl.h>
#include <c10/core/TensorImpl.h>
#include <c10/util/intrusive_ptr.h>

#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <initializer_list>
#include <map>
#include <mutex>
#include <new>
#include <vector>

#ifdef __linux__
#include <fcntl.h>
#include <pthread.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

// ---------------------------------------------------------------- pages

// What <linux/userfaultfd.h> and <linux/fs.h> of Linux 6.7 say; older headers lack it.
constexpr uint64_t LEAST_PAGES = 4;  // below this many whole pages hashing costs less than asking the kernel

#if defined(__linux__) && !defined(SYS_userfaultfd)
#define SYS_userfaultfd -1
#endif

struct ApiRequest { uint64_t api, features, ioctls; };
struct PageRange { uint64_t start, length; };
struct RegisterRequest { PageRange range; uint64_t mode, ioctls; };
struct ScanRequest {
    uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages;
    uint64_t category_inverted, category_mask, category_anyof_mask, return_mask;
};
struct ScanRegion { uint64_t start, end, categories; };

constexpr uint64_t API = 0xAA, WP_ASYNC = 1ull << 15, USER_MODE_ONLY = 1, MODE_WP = 2;
constexpr uint64_t PAGE_IS_WRITTEN = 2, PROTECT_MATCHING = 1, CHECK_PROTECTED = 2;

bool g_allowed = true;        // tests switch the kernel's help off
bool g_forked = false;        // this process is a child that has not begun to watch for itself
int g_faults = -1, g_pages = -1;
bool g_opened = false;
uint64_t g_page_size = 4096;
std::mutex g_mutex;

#ifdef __linux__
void after_fork_in_child() {
    new (&g_mutex) std::mutex();
    g_forked = true;
}

bool open_kernel() {
    if (g_opened) return g_faults >= 0 && g_pages >= 0;
    g_opened = true;
    g_page_size = static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
    static bool handled = pthread_atfork(nullptr, nullptr, after_fork_in_child) == 0;
    if (!handled) return false;
    // faults of the kernel itself are resolved without a handler in asynchronous mode, so user mode is enough
    g_faults = static_cast<int>(syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | USER_MODE_ONLY));
    if (g_faults < 0) return false;
    ApiRequest request{API, WP_ASYNC, 0};
    if (ioctl(g_faults, _IOWR(0xAA, 0x3F, ApiRequest), &request) == 0) {
        g_pages = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    }
    if (g_pages >= 0) return true;
    close(g_faults);
    g_faults = -1;
    return false;
}

int64_t scan(uint64_t first, uint64_t last, uint64_t flags, ScanRegion* out) {
    ScanRequest request{};
    request.size = sizeof(request);
    request.flags = flags | CHECK_PROTECTED;
    request.start = first;
    request.end = last;
    request.vec = reinterpret_cast<uint64_t>(out);
    request.vec_len = request.max_pages = out != nullptr ? 1 : 0;
    request.category_mask = request.return_mask = PAGE_IS_WRITTEN;
    return ioctl(g_pages, _IOWR('f', 16, ScanRequest), &request);
}

struct Mapping { uint64_t begin, end; bool is_private; };
std::vector<Mapping> g_mappings;  // empty: to be read again

void read_mappings() {
    std::FILE* maps = std::fopen("/proc/self/maps", "re");
    if (maps == nullptr) return;
    char line[512], permissions[8];
    unsigned long begin = 0, end = 0;
    bool starts = true;  // a line
    while (std::fgets(line, sizeof(line), maps) != nullptr) {
        if (starts && std::sscanf(line, "%lx-%lx %7s", &begin, &end, permissions) == 3) {
            g_mappings.push_back({begin, end, permissions[3] == 'p'});
        }
        starts = std::strchr(line, '\n') != nullptr;
    }
    std::fclose(maps);
}

// Whether only this process can write this memory through its addresses.
bool is_private(uint64_t first, uint64_t last) {
    if (g_mappings.empty()) read_mappings();
    uint64_t reached = first;
    for (const Mapping& mapping : g_mappings) {
        if (mapping.end <= reached) continue;
        if (mapping.begin > reached || !mapping.is_private) return false;
        reached = mapping.end;
        if (reached >= last) return true;
    }
    return false;
}

void forget_mappings() { g_mappings.clear(); }

bool watch_pages(uint64_t first, uint64_t last) {
    if (!open_kernel() || !is_private(first, last)) return false;
    RegisterRequest request{{first, last - first}, MODE_WP, 0};
    if (ioctl(g_faults, _IOWR(0xAA, 0x00, RegisterRequest), &request) != 0) return false;
    return scan(first, last, PROTECT_MATCHING, nullptr) >= 0;
}

void unwatch_pages(uint64_t first, uint64_t last) {
    PageRange range{first, last - first};
    ioctl(g_faults, _IOR(0xAA, 0x01, PageRange), &range);  // fails where the memory is another mapping by now
}

// 1: written since the last time, and protected again; 0: not written; -1: these pages are not watched
int written(uint64_t first, uint64_t last) {
    ScanRegion found{};
    int64_t count = scan(first, last, 0, &found);
    if (count == 0) return 0;
    if (count < 0 || scan(first, last, PROTECT_MATCHING, nullptr) < 0) return -1;
    return 1;
}

#else
bool open_kernel() { return false; }
void forget_mappings() {}
bool watch_pages(uint64_t, uint64_t) { return false; }
void unwatch_pages(uint64_t, uint64_t) {}
int written(uint64_t, uint64_t) { return -1; }
#endif

// ---------------------------------------------------------------- contents

// Each step is a bijection of the lane's state, so one changed word always shows, several with probability 1 - 2^-64.
uint64_t mixed(uint64_t state, uint64_t word) {
    state = (state ^ word) * 0x9E3779B97F4A7C15ull;
    return state ^ (state >> 32);
}

uint64_t hash(const char* begin, const char* end, uint64_t seed) {
    // eight independent chains, by name: as an array they stay in memory, at a third of the speed
    uint64_t a = seed, b = seed + 1, c = seed + 2, d = seed + 3, e = seed + 4, f = seed + 5, g = seed + 6, h = seed + 7;
    auto step = [&](const char* from) {
        auto word = [from](int i) {
            uint64_t value;
            std::memcpy(&value, from + 8 * i, 8);
            return value;
        };
        a = mixed(a, word(0));
        b = mixed(b, word(1));
        c = mixed(c, word(2));
        d = mixed(d, word(3));
        e = mixed(e, word(4));
        f = mixed(f, word(5));
        g = mixed(g, word(6));
        h = mixed(h, word(7));
    };
    for (; end - begin >= 64; begin += 64) step(begin);
    char rest[64] = {};
    std::memcpy(rest, begin, static_cast<size_t>(end - begin));
    step(rest);
    uint64_t result = seed;
    for (uint64_t lane : {a, b, c, d, e, f, g, h}) result = mixed(result, lane);
    return result;
}

// ---------------------------------------------------------------- blocks

struct Key {
    const void* storage;
    const char* begin;
    const char* end;
    bool operator<(const Key& other) const {
        if (storage != other.storage) return storage < other.storage;
        return begin != other.begin ? begin < other.begin : end < other.end;
    }
};

// Of the base class: the symbols of the others are not exported to code that is loaded as this is.
using Strong = c10::intrusive_ptr<c10::intrusive_ptr_target>;
using Weak = c10::weak_intrusive_ptr<c10::intrusive_ptr_target>;

struct Block {
    Key key{};
    Weak storage;                  // keeps the identity from being used again
    uint64_t first = 0, last = 0;  // its watched pages; none: all of it is hashed
    bool shared = false;           // others may write it: never watched by pages
    uint64_t epoch = 0;
    uint64_t hashed = 0;
    int64_t users = 0;

    Block() : storage(Strong()) {}
};

std::vector<Block> g_blocks;
uint64_t g_clock = 1;
std::vector<int64_t> g_free;
std::map<Key, int64_t> g_by_key;
std::map<uint64_t, int64_t> g_by_page;  // first watched page → block; the ranges are disjoint

void renew(Block& block) { block.epoch = ++g_clock; }

void stop_watching(Block& block) {
    if (block.first == block.last) return;
    g_by_page.erase(block.first);
    unwatch_pages(block.first, block.last);
    block.first = block.last = 0;
}

// Whether the storage is alive and still owns the memory of the block.
bool owns_memory(const Block& block) {
    Strong alive = block.storage.lock();
    if (!alive) return false;
    auto* storage = static_cast<c10::StorageImpl*>(alive.get());
    const char* data = static_cast<const char*>(storage->_mutable_data_ptr_no_checks().get());
    return data != nullptr && data <= block.key.begin && block.key.end <= data + storage->nbytes();
}

// Whether other live blocks watch some of these pages. Blocks whose memory is gone make room.
bool is_taken(uint64_t first, uint64_t last) {
    auto next = g_by_page.lower_bound(first);
    if (next != g_by_page.begin()) --next;
    while (next != g_by_page.end() && next->first < last) {
        Block& other = g_blocks[static_cast<size_t>((next++)->second)];
        if (other.last <= first) continue;
        if (owns_memory(other)) return true;
        stop_watching(other);
        renew(other);
    }
    return false;
}

void start_watching(int64_t id) {
    Block& block = g_blocks[static_cast<size_t>(id)];
    if (!g_allowed || block.shared || !open_kernel()) return;
    uint64_t begin = reinterpret_cast<uint64_t>(block.key.begin), end = reinterpret_cast<uint64_t>(block.key.end);
    uint64_t first = (begin + g_page_size - 1) / g_page_size * g_page_size, last = end / g_page_size * g_page_size;
    if (last < first + LEAST_PAGES * g_page_size || is_taken(first, last) || !watch_pages(first, last)) return;
    block.first = first;
    block.last = last;
    g_by_page[first] = id;
    renew(block);
}

uint64_t hash_unwatched(const Block& block) {
    if (block.first == block.last) return hash(block.key.begin, block.key.end, 1);
    const char* first = reinterpret_cast<const char*>(block.first);
    const char* last = reinterpret_cast<const char*>(block.last);
    return hash(last, block.key.end, hash(block.key.begin, first, 1));
}

// After a fork the kernel watches nothing of the child, and the descriptors are those of the parent.
void begin_again_in_child() {
    g_forked = false;
    forget_mappings();
#ifdef __linux__
    if (g_faults >= 0) close(g_faults);
    if (g_pages >= 0) close(g_pages);
    g_faults = g_pages = -1;
    g_opened = false;
#endif
    g_by_page.clear();
    for (size_t id = 0; id < g_blocks.size(); ++id) {
        Block& block = g_blocks[id];
        bool watched = block.first != block.last;
        block.first = block.last = 0;
        if (!watched) continue;  // hashes are as good as before
        renew(block);
        if (owns_memory(block)) start_watching(static_cast<int64_t>(id));
    }
}

// The epoch now. What is read from the block afterwards is what this epoch stands for, or is found changed next time.
// The storage must own the memory.
uint64_t poll(int64_t id) {
    Block& block = g_blocks[static_cast<size_t>(id)];
    if (block.first != block.last) {
        int found = written(block.first, block.last);
        if (found != 0) renew(block);
        if (found < 0) {  // another mapping came to this place
            forget_mappings();
            stop_watching(block);
            start_watching(id);
        }
    }
    uint64_t hashed = hash_unwatched(block);
    if (hashed != block.hashed) renew(block);
    block.hashed = hashed;
    return block.epoch;
}

int64_t acquire(c10::StorageImpl* storage, const char* begin, const char* end, bool shared) {
    Key key{storage, begin, end};
    auto known = g_by_key.find(key);
    if (known != g_by_key.end()) {
        Block& block = g_blocks[static_cast<size_t>(known->second)];
        ++block.users;
        if (shared && !block.shared) {
            block.shared = true;
            stop_watching(block);
            renew(block);
        }
        if (block.first == block.last) start_watching(known->second);
        return known->second;
    }
    int64_t id = static_cast<int64_t>(g_blocks.size());
    if (g_free.empty()) {
        g_blocks.emplace_back();
    } else {
        id = g_free.back();
        g_free.pop_back();
    }
    Block& block = g_blocks[static_cast<size_t>(id)];
    renew(block);
    block.key = key;
    block.storage = Weak(Strong::unsafe_reclaim_from_nonowning(storage));
    block.users = 1;
    block.shared = shared;
        g_by_key[key] = id;
    start_watching(id);
    return id;
}

void release(int64_t id) {
    Block& block = g_blocks[static_cast<size_t>(id)];
    if (--block.users > 0) return;
    stop_watching(block);
    g_by_key.erase(block.key);
    block.storage.reset();
    renew(block);
    g_free.push_back(id);
}

// ---------------------------------------------------------------- tensors

// One tensor of a watch: which memory it has, and how it reads it.
struct Tensor {
    c10::StorageImpl* storage = nullptr;
    const char* data = nullptr;
    int64_t block = -1;  // none: it has no entries
    bool readable = true;
    caffe2::TypeMeta dtype;
    int64_t itemsize = 0;
    bool conjugate = false, negative = false;
    std::vector<int64_t> sizes, strides;
};

struct Watch {
    std::vector<Tensor> tensors;
};

const char* data_of(const c10::TensorImpl* tensor, int64_t itemsize) {
    auto* storage = tensor->unsafe_storage().unsafeGetStorageImpl();
    const char* data = static_cast<const char*>(storage->_mutable_data_ptr_no_checks().get());
    return data == nullptr ? nullptr : data + tensor->storage_offset() * itemsize;
}

int64_t bytes_of(const c10::TensorImpl* tensor, int64_t itemsize) {
    auto sizes = tensor->sizes(), strides = tensor->strides();
    int64_t last = 0;
    for (size_t i = 0; i < sizes.size(); ++i) {
        if (sizes[i] == 0) return 0;
        last += (sizes[i] - 1) * strides[i];
    }
    return (last + 1) * itemsize;
}

// Whether a tensor reads memory that its storage has. Not after `storage.resize_(0)`.
bool is_readable(const c10::TensorImpl* tensor, int64_t itemsize) {
    int64_t bytes = bytes_of(tensor, itemsize);
    if (bytes == 0) return true;
    auto* storage = tensor->unsafe_storage().unsafeGetStorageImpl();
    int64_t end = tensor->storage_offset() * itemsize + bytes;
    return data_of(tensor, itemsize) != nullptr && static_cast<uint64_t>(end) <= storage->nbytes();
}

bool same(const Tensor& known, const c10::TensorImpl* tensor) {
    return tensor->unsafe_storage().unsafeGetStorageImpl() == known.storage &&
           data_of(tensor, known.itemsize) == known.data && tensor->dtype() == known.dtype &&
           tensor->sizes().equals(known.sizes) && tensor->strides().equals(known.strides) &&
           tensor->is_conj() == known.conjugate && tensor->is_neg() == known.negative &&
           is_readable(tensor, known.itemsize) == known.readable;
}

}  // namespace

extern "C" {

// Whether the kernel tells which pages were written.
int64_t normfx_watches_pages() {
    std::lock_guard<std::mutex> guard(g_mutex);
    return g_allowed && open_kernel();
}

// For tests: with 0, new blocks are hashed.
void normfx_allow_pages(int64_t allowed) { g_allowed = allowed != 0; }

Watch* normfx_watch(
    c10::TensorImpl* const* tensors, const uint8_t* itemsizes, const uint8_t* shared, int64_t count) {
    std::lock_guard<std::mutex> guard(g_mutex);
    if (g_forked) begin_again_in_child();
    forget_mappings();
    auto* watch = new Watch();
    watch->tensors.resize(static_cast<size_t>(count));
    for (int64_t i = 0; i < count; ++i) {
        const c10::TensorImpl* tensor = tensors[i];
        Tensor& known = watch->tensors[static_cast<size_t>(i)];
        known.storage = tensor->unsafe_storage().unsafeGetStorageImpl();
        known.itemsize = itemsizes[i];
        known.data = data_of(tensor, known.itemsize);
        known.dtype = tensor->dtype();
        known.sizes = tensor->sizes().vec();
        known.strides = tensor->strides().vec();
        known.conjugate = tensor->is_conj();
        known.negative = tensor->is_neg();
        known.readable = is_readable(tensor, known.itemsize);
        int64_t bytes = bytes_of(tensor, known.itemsize);
        if (bytes == 0 || !known.readable) continue;
        known.block = acquire(known.storage, known.data, known.data + bytes, shared[i] != 0);
    }
    return watch;
}

void normfx_unwatch(Watch* watch) {
    std::lock_guard<std::mutex> guard(g_mutex);
    for (const Tensor& known : watch->tensors) {
        if (known.block >= 0) release(known.block);
    }
    delete watch;
}

// The epoch of each tensor; 0 of one that cannot be read, or is not the one that is watched.
void normfx_read(const Watch* watch, c10::TensorImpl* const* tensors, uint64_t* epochs) {
    std::lock_guard<std::mutex> guard(g_mutex);
    if (g_forked) begin_again_in_child();
    for (size_t i = 0; i < watch->tensors.size(); ++i) {
        const Tensor& known = watch->tensors[i];
        if (!known.readable || !same(known, tensors[i])) {
            epochs[i] = 0;
        } else {
            epochs[i] = known.block < 0 ? 1 : poll(known.block);
        }
    }
}

// Whether these tensors differ from those that are watched, or their contents from what they were at these epochs.
int64_t normfx_changed(const Watch* watch, c10::TensorImpl* const* tensors, const uint64_t* epochs) {
    std::lock_guard<std::mutex> guard(g_mutex);
    if (g_forked) return 1;
    constexpr size_t ahead = 4;
    size_t count = watch->tensors.size();
    for (size_t i = 0; i < count; ++i) {
        if (i + ahead < count) __builtin_prefetch(tensors[i + ahead]);
        const Tensor& known = watch->tensors[i];
        if (!known.readable || !same(known, tensors[i])) return 1;
    }
    // only now is all of the memory known to be there
    for (size_t i = 0; i < count; ++i) {
        int64_t block = watch->tensors[i].block;
        if (block >= 0 && poll(block) != epochs[i]) return 1;
    }
    return 0;
}

// Blocks that are in use, and those whose pages are watched: for tests.
int64_t normfx_blocks(int64_t by_pages) {
    std::lock_guard<std::mutex> guard(g_mutex);
    int64_t count = 0;
    for (const Block& block : g_blocks) count += block.users > 0 && (by_pages == 0 || block.first != block.last);
    return count;
}

}  // extern "C"
