// Detects whether the memory of CPU tensors was written, by whatever means.
//
// A block is the memory of one tensor. It gets a new epoch, unlike any before, whenever a change of its contents is found:
// what was computed from a block is true as long as the epoch is the one at which it was computed, whoever looked meanwhile.
//
// Where the kernel tells which pages were written (pages.cpp), a block is watched by its pages. Its first and last page are
// shared with other memory: when one of them was written, the part that belongs to the block is hashed. Where the kernel
// does not help, and for memory that other processes or devices may write, the whole contents are hashed in each call.
// Pages of a file that is mapped privately change with the file too, whose times are looked at (files.cpp).
//
// All functions are called with Python's lock held: they are short, and no other thread may free what they read. The mutex
// is for interpreters without that lock.

#include <c10/core/StorageImpl.h>
#include <c10/core/TensorImpl.h>
#include <c10/util/intrusive_ptr.h>

#include <algorithm>
#include <deque>
#include <initializer_list>
#include <map>
#include <set>

namespace {

bool g_allowed = true;  // tests switch the kernel's help off

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

// The part of a block on its first or last page.
struct Edge {
    const char* begin = nullptr;
    const char* end = nullptr;
    uint64_t hashed = 0;
    uint64_t alarm = 0;  // the last poll at which its page had been written, but not the edge
    int alarms = 0;      // such polls in close succession
    bool busy = false;   // its page is written all the time: hashed in each call

    bool refresh() {
        uint64_t now = hash(begin, end, 1);
        bool changed = now != hashed;
        hashed = now;
        return changed;
    }
};

struct Block {
    Key key{};
    Weak storage;           // keeps the identity from being used again
    PageRange pages{0, 0};  // that are watched; none: the whole contents are hashed
    Edge edges[2];          // on the first and the last page; without pages the first edge is all of the block
    Files files;            // that the pages are mapped from
    uint64_t generation = 0;   // of the files, when the epoch began
    bool shared = false;       // others may write it: never watched by pages
    bool by_contents = false;  // all of it is hashed
    uint64_t epoch = 0;
    uint64_t polls = 0;
    int64_t users = 0;

    Block() : storage(Strong()) {}
    bool watched() const { return pages.first < pages.last; }
};

constexpr int ALARMS = 8;             // false alarms until an edge counts as busy
constexpr uint64_t QUIET = 4;         // polls without an alarm after which they are counted from the beginning
constexpr uint64_t PATIENCE = 1024;   // polls until a busy edge is given another chance
constexpr uint64_t GAP = 256 * 4096;  // walking over this much takes the kernel as long as one more question

std::deque<Block> g_blocks;  // their addresses stay
uint64_t g_clock = 1;
uint64_t g_layout = 1;  // grows when the watched pages of a block change
std::vector<int64_t> g_free;
std::map<Key, int64_t> g_by_key;
std::set<uint64_t> g_breaks;  // ends of pages after which comes memory that cannot be registered

struct Place { PageRange pages; uint64_t reach; int64_t block; };
std::vector<Place> g_places;  // of all watched blocks, by first page; reach: the end of this and all places before it
uint64_t g_places_layout = 0;

void renew(Block& block) { block.epoch = ++g_clock; }

// Whether the storage still owns the memory of the block. `alive` keeps it while it is read.
bool owns_memory(const Block& block, Strong& alive) {
    alive = block.storage.lock();
    if (!alive) return false;
    auto* storage = static_cast<c10::StorageImpl*>(alive.get());
    const char* data = static_cast<const char*>(storage->_mutable_data_ptr_no_checks().get());
    return data != nullptr && data <= block.key.begin && block.key.end <= data + storage->nbytes();
}

uint64_t address(const char* place) { return reinterpret_cast<uint64_t>(place); }

void set_pages(Block& block, PageRange pages) {
    if (pages.first == block.pages.first && pages.last == block.pages.last) return;
    block.pages = pages;
    ++g_layout;
}

// The pages of a block, without those of busy edges.
PageRange quiet_pages(const Block& block) {
    const auto& [head, tail] = block.edges;
    PageRange pages{head.busy ? page_after(address(head.end)) : page_of(address(block.key.begin)),
                    tail.busy ? page_of(address(tail.begin)) : page_after(address(block.key.end))};
    return pages.first < pages.last ? pages : PageRange{0, 0};
}

// All of the block is hashed from now on. Its memory must be there.
void watch_contents(Block& block) {
    if (block.by_contents && block.edges[0].busy) return;  // as it is
    set_pages(block, {0, 0});
    block.files.clear();
    block.edges[0] = Edge{block.key.begin, block.key.end};
    block.edges[0].busy = block.by_contents = true;
    block.edges[1] = Edge{};
    block.edges[0].refresh();
    renew(block);
}

void stop_watching(Block& block) {
    set_pages(block, {0, 0});
    block.files.clear();
    for (Edge& edge : block.edges) edge = Edge{};
    block.by_contents = false;
    renew(block);
}

// ---------------------------------------------------------------- pages of blocks

void sort_places() {
    if (g_places_layout == g_layout) return;
    g_places.clear();
    for (size_t id = 0; id < g_blocks.size(); ++id) {
        const Block& block = g_blocks[id];
        if (block.watched()) g_places.push_back({block.pages, 0, static_cast<int64_t>(id)});
    }
    std::sort(g_places.begin(), g_places.end(), [](const Place& a, const Place& b) {
        return a.pages.first < b.pages.first;
    });
    uint64_t reach = 0;
    for (Place& place : g_places) place.reach = reach = std::max(reach, place.pages.last);
    g_places_layout = g_layout;
}

// The page of an edge was written, and is protected again. Whether the edge was.
bool edge_written(Edge& edge, uint64_t poll) {
    if (edge.refresh()) return true;
    if (poll - edge.alarm > QUIET) edge.alarms = 0;
    edge.alarm = poll;
    edge.busy = ++edge.alarms >= ALARMS;
    return false;
}

// Some pages of a block were written, and are protected again.
void block_written(Block& block, PageRange pages) {
    if (!block.watched()) return;  // not any more
    Strong alive;
    if (!owns_memory(block, alive)) return stop_watching(block);
    auto& [head, tail] = block.edges;
    bool changed = std::max(pages.first, address(head.end)) < std::min(pages.last, address(tail.begin));
    if (head.begin < head.end && pages.first < address(head.end)) changed |= edge_written(head, block.polls);
    if (tail.begin < tail.end && pages.last > address(tail.begin)) changed |= edge_written(tail, block.polls);
    if (changed) renew(block);
    set_pages(block, quiet_pages(block));
}

PageRange common(PageRange a, PageRange b) { return {std::max(a.first, b.first), std::min(a.last, b.last)}; }

// Calls `visit` with each block that watches some of these pages, and which of them.
template <class Visit>
void each_block(PageRange pages, Visit visit) {
    sort_places();
    std::vector<std::pair<int64_t, PageRange>> found;  // a visit may change the places
    auto above = [](uint64_t last, const Place& place) { return last <= place.pages.first; };
    auto next = std::upper_bound(g_places.begin(), g_places.end(), pages.last, above);
    while (next != g_places.begin() && (--next)->reach > pages.first) {
        PageRange both = common(next->pages, pages);
        if (both.first < both.last) found.emplace_back(next->block, both);
    }
    for (auto [id, its] : found) visit(g_blocks[static_cast<size_t>(id)], its);
}

// Protects pages, and tells all blocks that they belong to which of them had been written: whoever protects a page takes
// the sign away from everybody. False: the pages cannot be watched.
bool protect(PageRange pages) {
    return each_written(pages, [](PageRange run) { each_block(run, block_written); }, PROTECT_MATCHING);
}

// The first half: whether the pages of a block, all of them, are protected from now on.
bool protect_all(Block& block) {
    if (!g_allowed || block.shared) return false;
    PageRange pages{page_of(address(block.key.begin)), page_after(address(block.key.end))};
    Files files;
    auto visit = [&](const Mapping& mapping) {
        if (!is_file(mapping)) return true;
        files.push_back(file_of(mapping));
        return files.back() != nullptr;
    };
    if (!register_mappings(pages, visit)) return false;
    block.files = std::move(files);
    return protect(pages);
}

// The second half: what the block holds now is what a new epoch stands for.
void begin_watching(Block& block, bool by_pages) {
    if (!by_pages) return watch_contents(block);
    uint64_t begin = address(block.key.begin), end = address(block.key.end);
    const char* head = reinterpret_cast<const char*>(std::min(page_after(begin), end));
    const char* tail = std::max(reinterpret_cast<const char*>(page_of(end)), head);
    block.edges[0] = Edge{block.key.begin, head};
    block.edges[1] = Edge{tail, block.key.end};
    block.by_contents = false;
    set_pages(block, quiet_pages(block));
    block.generation = generations(block.files);
    for (Edge& edge : block.edges) edge.refresh();
    renew(block);
}

// Watches pages if possible, else contents. The memory must be there.
void start_watching(Block& block) { begin_watching(block, protect_all(block)); }

void begin_again(Block& block) {
    Strong alive;
    if (owns_memory(block, alive)) start_watching(block);
    else stop_watching(block);
}

// Watches the pages of busy edges again: their neighbours may have come to rest.
void watch_edges(Block& block) {
    for (Edge& edge : block.edges) {
        if (!edge.busy || !protect({page_of(address(edge.begin)), page_after(address(edge.end))})) continue;
        edge.busy = false;
        edge.alarms = ALARMS - 1;
        edge.alarm = block.polls;
        if (edge.refresh()) renew(block);
    }
    set_pages(block, quiet_pages(block));
}

// Some of these pages were written.
void pages_written(PageRange pages) {
    if (!protect(pages)) each_block(pages, [](Block& block, PageRange) { begin_again(block); });
}

// The block of this memory; put on `fresh` if it is to be watched from now on.
int64_t acquire(c10::StorageImpl* storage, const char* begin, const char* end, bool shared, std::vector<int64_t>& fresh) {
    Key key{storage, begin, end};
    auto known = g_by_key.find(key);
    if (known != g_by_key.end()) {
        Block& block = g_blocks[static_cast<size_t>(known->second)];
        ++block.users;
        if (shared && !block.shared) stop_watching(block);
        block.shared |= shared;
        if (block.by_contents || !(block.watched() || block.edges[0].busy || block.edges[1].busy)) {
            fresh.push_back(known->second);
        }
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
    block.key = key;
    block.storage = Weak(Strong::unsafe_reclaim_from_nonowning(storage));
    block.users = 1;
    block.shared = shared;
    g_by_key[key] = id;
    fresh.push_back(id);
    return id;
}

// All pages first: a page that two of them share is protected twice, and neither has looked at its contents then.
void watch_together(const std::vector<int64_t>& fresh) {
    std::vector<bool> by_pages;
    for (int64_t id : fresh) by_pages.push_back(protect_all(g_blocks[static_cast<size_t>(id)]));
    for (size_t i = 0; i < fresh.size(); ++i) begin_watching(g_blocks[static_cast<size_t>(fresh[i])], by_pages[i]);
}

// After a fork the kernel watches nothing of the child, and the descriptors are those of the parent.
void begin_again_in_child() {
    g_forked = false;
    close_kernel();
    forget_mappings();
    std::vector<int64_t> watched;
    std::vector<Strong> kept;
    for (size_t id = 0; id < g_blocks.size(); ++id) {
        Block& block = g_blocks[id];
        if (!block.watched()) continue;  // hashes are as good as before
        stop_watching(block);
        Strong alive;
        if (!owns_memory(block, alive)) continue;
        kept.push_back(std::move(alive));
        watched.push_back(static_cast<int64_t>(id));
    }
    watch_together(watched);
}

void release(int64_t id) {
    Block& block = g_blocks[static_cast<size_t>(id)];
    if (--block.users > 0) return;
    stop_watching(block);
    g_by_key.erase(block.key);
    block.storage.reset();
    g_free.push_back(id);
    if (!g_by_key.empty()) return;
    close_kernel();  // nothing is watched: all mappings are again what they were
    g_breaks.clear();
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

// Pages that one question to the kernel reaches over: watched ones, and gaps between them.
struct Span {
    PageRange pages;
    size_t first, last;  // its ranges
};

struct Watch {
    std::vector<Tensor> tensors;
    std::vector<PageRange> ranges;  // the watched pages of its blocks, in order, disjoint
    std::vector<Span> spans;
    uint64_t layout = 0;  // g_layout at which ranges and spans were made
};

void lay_out(Watch& watch) {
    sort_places();
    if (watch.layout == g_layout) return;
    watch.layout = g_layout;
    std::vector<PageRange> pages;
    for (const Tensor& tensor : watch.tensors) {
        if (tensor.block < 0) continue;
        const Block& block = g_blocks[static_cast<size_t>(tensor.block)];
        if (block.watched()) pages.push_back(block.pages);
    }
    std::sort(pages.begin(), pages.end(), [](PageRange a, PageRange b) { return a.first < b.first; });
    watch.ranges.clear();
    watch.spans.clear();
    for (PageRange range : pages) {
        if (!watch.ranges.empty() && range.first <= watch.ranges.back().last) {
            uint64_t& last = watch.ranges.back().last;
            watch.spans.back().pages.last = last = std::max(last, range.last);
            continue;
        }
        watch.ranges.push_back(range);
        size_t count = watch.ranges.size();
        uint64_t reached = watch.spans.empty() ? 0 : watch.spans.back().pages.last;
        if (watch.spans.empty() || range.first - reached > GAP || g_breaks.count(reached) != 0) {
            watch.spans.push_back({range, count - 1, count});
        } else {
            watch.spans.back().pages.last = range.last;
            watch.spans.back().last = count;
        }
    }
}

// Finds what was written of the ranges of a span. False: some of its mappings are not registered.
bool read_span(const Watch& watch, const Span& span) {
    auto next = watch.ranges.begin() + static_cast<std::ptrdiff_t>(span.first);
    auto end = watch.ranges.begin() + static_cast<std::ptrdiff_t>(span.last);
    return each_written(span.pages, [&](PageRange written) {  // in order of addresses
        for (; next != end && next->first < written.last; ++next) {
            PageRange both = common(*next, written);
            if (both.first < both.last) pages_written(both);
            if (next->last > written.last) break;  // the next run may be in this range too
        }
    });
}

// After read_span failed: other memory came to a place in a gap, or to that of a block.
void mend_span(const Watch& watch, const Span& span) {
    forget_mappings();
    ++g_layout;
    for (size_t i = span.first; i < span.last; ++i) {
        PageRange range = watch.ranges[i];
        if (!each_written(range, pages_written)) {
            each_block(range, [](Block& block, PageRange) { begin_again(block); });
        }
        if (i + 1 == span.last) break;
        if (!each_written({range.last, watch.ranges[i + 1].first}, [](PageRange) {})) g_breaks.insert(range.last);
    }
}

// Looks at each file that blocks of a watch are mapped from once.
void refresh_files(const Watch& watch) {
    std::set<File*> files;
    for (const Tensor& tensor : watch.tensors) {
        if (tensor.block < 0) continue;
        for (const auto& file : g_blocks[static_cast<size_t>(tensor.block)].files) files.insert(file.get());
    }
    for (File* file : files) file->refresh();
}

void compare_files(Block& block) {
    uint64_t now = generations(block.files);
    if (now != block.generation) renew(block);
    block.generation = now;
}

// Brings the epochs of all blocks of a watch up to date. Their memory must be there.
void poll(Watch& watch) {
    constexpr int ATTEMPTS = 8;
    bool read = false;
    for (int attempt = 0; !read && attempt < ATTEMPTS; ++attempt) {
        lay_out(watch);
        read = true;
        for (const Span& span : watch.spans) {
            if (read_span(watch, span)) continue;
            mend_span(watch, span);
            read = false;
        }
    }
    refresh_files(watch);
    for (const Tensor& tensor : watch.tensors) {
        if (tensor.block < 0) continue;
        Block& block = g_blocks[static_cast<size_t>(tensor.block)];
        if (!read && block.watched()) watch_contents(block);  // mappings change all the time
        if (!block.watched() && !block.edges[0].busy && !block.edges[1].busy) start_watching(block);  // it was freed
        for (Edge& edge : block.edges) {
            if (edge.busy && edge.refresh()) renew(block);
        }
        if (!block.files.empty()) compare_files(block);
        if (++block.polls % PATIENCE == 0 && !block.by_contents) watch_edges(block);
    }
}

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

uint64_t epoch(const Tensor& tensor) {
    return tensor.block < 0 ? 1 : g_blocks[static_cast<size_t>(tensor.block)].epoch;
}

}  // namespace

extern "C" {

// Whether the kernel tells which pages were written.
int64_t normfx_watches_pages() {
    std::lock_guard<std::recursive_mutex> guard(g_mutex);
    return g_allowed && open_kernel();
}

// For tests: with 0, new blocks are hashed.
void normfx_allow_pages(int64_t allowed) { g_allowed = allowed != 0; }

Watch* normfx_watch(
    c10::TensorImpl* const* tensors, const uint8_t* itemsizes, const uint8_t* shared, int64_t count) {
    std::lock_guard<std::recursive_mutex> guard(g_mutex);
    if (g_forked) begin_again_in_child();
    forget_mappings();
    auto* watch = new Watch();
    std::vector<int64_t> fresh;
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
        known.block = acquire(known.storage, known.data, known.data + bytes, shared[i] != 0, fresh);
    }
    watch_together(fresh);
    return watch;
}

void normfx_unwatch(Watch* watch) {
    std::lock_guard<std::recursive_mutex> guard(g_mutex);
    for (const Tensor& known : watch->tensors) {
        if (known.block >= 0) release(known.block);
    }
    delete watch;
}

// The epoch of each tensor; 0 for all if one cannot be read, or is not the one that is watched.
void normfx_read(Watch* watch, c10::TensorImpl* const* tensors, uint64_t* epochs) {
    std::lock_guard<std::recursive_mutex> guard(g_mutex);
    if (g_forked) begin_again_in_child();
    size_t count = watch->tensors.size();
    bool there = true;
    for (size_t i = 0; i < count; ++i) {
        const Tensor& known = watch->tensors[i];
        there &= known.readable && same(known, tensors[i]);
    }
    if (!there) return std::fill(epochs, epochs + count, 0);
    poll(*watch);
    for (size_t i = 0; i < count; ++i) epochs[i] = epoch(watch->tensors[i]);
}

// Whether tensors differ from those that are watched, or their contents from what they were at these epochs.
//
// objects: Python's tensors, with the address of the C++ tensor `payload` bytes after their own; all of this, and what it
// leads to, is out of the cache when a model has run, hence the order
int64_t normfx_changed(Watch* watch, const char* const* objects, int64_t payload, const uint64_t* epochs) {
    std::lock_guard<std::recursive_mutex> guard(g_mutex);
    if (g_forked) return 1;
    auto prefetch = [](const void* place, int lines) {
        for (int line = 0; line < lines; ++line) __builtin_prefetch(static_cast<const char*>(place) + 64 * line);
    };
    auto tensor = [&](size_t i) { return *reinterpret_cast<c10::TensorImpl* const*>(objects[i] + payload); };
    size_t count = watch->tensors.size();
    for (size_t i = 0; i < count; ++i) {
        prefetch(objects[i] + payload, 1);
        prefetch(watch->tensors[i].storage, 2);
    }
    for (size_t i = 0; i < count; ++i) prefetch(tensor(i), 3);
    for (size_t i = 0; i < count; ++i) {
        const Tensor& known = watch->tensors[i];
        if (!known.readable || !same(known, tensor(i))) return 1;
    }
    poll(*watch);  // only now is all of the memory known to be there
    for (size_t i = 0; i < count; ++i) {
        if (epoch(watch->tensors[i]) != epochs[i]) return 1;
    }
    return 0;
}

// Blocks that are in use, and those whose pages are watched: for tests.
int64_t normfx_blocks(int64_t by_pages) {
    std::lock_guard<std::recursive_mutex> guard(g_mutex);
    int64_t count = 0;
    for (const Block& block : g_blocks) count += block.users > 0 && (by_pages == 0 || block.watched());
    return count;
}

}  // extern "C"
