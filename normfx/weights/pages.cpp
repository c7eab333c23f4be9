// Asks the Linux kernel which pages of this process's memory were written.
//
// Linux 6.7 and newer tell which pages were written since they were last protected: userfaultfd with asynchronous write
// protection, read by PAGEMAP_SCAN. Whole mappings are registered, so that one question can reach over many tensors and
// what lies between them; only the pages of tensors are protected.
//
// native.py compiles this file, files.cpp and memory.cpp as one.

#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <mutex>
#include <new>
#include <string>
#include <vector>

#ifdef __linux__
#include <fcntl.h>
#include <pthread.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

struct PageRange { uint64_t first, last; };  // addresses: of the first page, and after the last

bool g_forked = false;  // this process is a child that has not begun to watch for itself
uint64_t g_page_size = 4096;
std::recursive_mutex g_mutex;  // the last reference to a storage may run Python code, which may come back here

uint64_t page_of(uint64_t address) { return address / g_page_size * g_page_size; }
uint64_t page_after(uint64_t address) { return page_of(address + g_page_size - 1); }

constexpr uint64_t PROTECT_MATCHING = 1;  // of PAGEMAP_SCAN

#ifdef __linux__

#ifndef SYS_userfaultfd
#define SYS_userfaultfd -1
#endif

// What <linux/userfaultfd.h> and <linux/fs.h> of Linux 6.7 say; older headers lack it.
struct ApiRequest { uint64_t api, features, ioctls; };
struct RegisterRequest { uint64_t start, length, mode, ioctls; };
struct ScanRequest {
    uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages;
    uint64_t category_inverted, category_mask, category_anyof_mask, return_mask;
};
struct ScanRegion { uint64_t start, end, categories; };

constexpr uint64_t API = 0xAA, WP_ASYNC = 1ull << 15, USER_MODE_ONLY = 1, MODE_WP = 2;
constexpr uint64_t PAGE_IS_WRITTEN = 2, CHECK_PROTECTED = 2;

int g_faults = -1, g_pages = -1;
bool g_opened = false;

void after_fork_in_child() {
    new (&g_mutex) std::recursive_mutex();
    g_forked = true;
}

// Takes back all registrations and protections, in one step.
void close_kernel() {
    if (g_faults >= 0) close(g_faults);
    if (g_pages >= 0) close(g_pages);
    g_faults = g_pages = -1;
    g_opened = false;
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

// Finds pages that are not protected; returns how many runs of them were stored. Negative: a mapping is not registered.
int scan(ScanRequest& request, PageRange pages) {
    request.size = sizeof(request);
    request.flags |= CHECK_PROTECTED;
    request.start = pages.first;
    request.end = pages.last;
    request.category_mask = request.return_mask = PAGE_IS_WRITTEN;
    return ioctl(g_pages, _IOWR('f', 16, ScanRequest), &request);
}

// Calls `found` with each run of pages that are not protected; with PROTECT_MATCHING as `flags` each is protected before it
// is reported, in one step, so that no write is lost between. False: not all of the mappings are registered.
template <class Found>
bool each_written(PageRange pages, Found found, uint64_t flags = 0) {
    ScanRegion regions[64];
    while (pages.first < pages.last) {
        ScanRequest request{};
        request.flags = flags;
        request.vec = reinterpret_cast<uint64_t>(regions);
        request.vec_len = sizeof(regions) / sizeof(regions[0]);
        int count = scan(request, pages);
        if (count < 0) return false;
        for (int i = 0; i < count; ++i) found(PageRange{regions[i].start, regions[i].end});
        if (request.walk_end <= pages.first) return false;
        pages.first = request.walk_end;
    }
    return true;
}

struct Mapping {
    PageRange pages;
    bool is_private;  // only this process can write this memory through its addresses
    uint64_t inode;   // of the file that is mapped; 0: none
    std::string path;
    bool registered = false;
};
std::vector<Mapping> g_mappings;  // in order of addresses; empty: to be read again

void forget_mappings() { g_mappings.clear(); }

void read_mappings() {
    std::FILE* maps = std::fopen("/proc/self/maps", "re");
    if (maps == nullptr) return;
    char line[8192], permissions[8];
    unsigned long begin = 0, end = 0, inode = 0;
    bool starts = true;  // a line
    while (std::fgets(line, sizeof(line), maps) != nullptr) {
        int path = 0;
        char* line_end = std::strchr(line, '\n');
        if (line_end != nullptr) *line_end = '\0';
        if (starts && std::sscanf(line, "%lx-%lx %7s %*s %*s %lu %n", &begin, &end, permissions, &inode, &path) == 4) {
            g_mappings.push_back({{begin, end}, permissions[3] == 'p', inode, line + path});
        }
        starts = line_end != nullptr;
    }
    std::fclose(maps);
}

bool register_pages(PageRange pages) {
    RegisterRequest request{pages.first, pages.last - pages.first, MODE_WP, 0};
    return ioctl(g_faults, _IOWR(0xAA, 0x00, RegisterRequest), &request) == 0;
}

// Registers the mappings of these pages; `visit` is called with each of them. False: they cannot be watched.
template <class Visit>
bool register_mappings(PageRange pages, Visit visit) {
    if (!open_kernel()) return false;
    if (g_mappings.empty()) read_mappings();
    uint64_t reached = pages.first;
    for (Mapping& mapping : g_mappings) {
        if (mapping.pages.last <= reached) continue;
        if (mapping.pages.first > reached || !mapping.is_private) return false;
        if (!mapping.registered) mapping.registered = register_pages(mapping.pages);
        if (!mapping.registered || !visit(mapping)) return false;
        reached = mapping.pages.last;
        if (reached >= pages.last) return true;
    }
    return false;
}

#else
struct Mapping {};
bool open_kernel() { return false; }
void close_kernel() {}
void forget_mappings() {}
template <class Visit>
bool register_mappings(PageRange, Visit) { return false; }
template <class Found>
bool each_written(PageRange, Found, uint64_t = 0) { return false; }
#endif

}  // namespace
