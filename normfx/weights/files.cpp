// Detects whether a file was written that this process has mapped privately: `torch.load(mmap=True)`, safetensors.
//
// What is written to such a file shows in all pages of the mapping that the process itself has not written, and the
// protection of pages does not tell. The file's time of change does.

#include <algorithm>
#include <ctime>
#include <map>
#include <memory>

#ifdef __linux__
#include <sys/stat.h>
#endif

namespace {

#ifdef __linux__

class File {
  public:
    File(int descriptor, uint64_t inode) : descriptor_(descriptor), inode_(inode) { refresh(); }
    ~File() {
        struct stat found;
        bool ours = fstat(descriptor_, &found) == 0 && found.st_ino == inode_ && (fcntl(descriptor_, F_GETFL) & O_PATH);
        if (ours) close(descriptor_);
    }
    File(const File&) = delete;
    File& operator=(const File&) = delete;

    uint64_t generation() const { return generation_; }

    // Gives the file a new generation if it may have been written since the last call.
    void refresh() {
        struct statx now;
        // without asking a server: what the kernel does not know yet is not in the mapping either
        constexpr unsigned WANTED = STATX_CTIME | STATX_SIZE | STATX_INO;
        int failed = statx(descriptor_, "", AT_EMPTY_PATH | AT_STATX_DONT_SYNC, WANTED, &now);
        if (failed != 0 || now.stx_ino != inode_) {  // the program closed the descriptor, or it is another file's now
            ++generation_;
            return;
        }
        int64_t changed = nanoseconds(now.stx_ctime.tv_sec, now.stx_ctime.tv_nsec);
        if (unsettled_ || changed != changed_ || now.stx_size != size_) ++generation_;
        timespec clock;
        clock_gettime(CLOCK_REALTIME, &clock);
        int64_t age = nanoseconds(clock.tv_sec, clock.tv_nsec) - changed;
        int64_t tick = now.stx_ctime.tv_nsec == 0 ? COARSE : TICK;
        int64_t settled = tick + static_cast<int64_t>(std::min<uint64_t>(now.stx_size, MOST)) * 1'000'000'000 / SPEED;
        unsettled_ = age < settled && age > -settled;
        changed_ = changed;
        size_ = now.stx_size;
    }

  private:
    // Two writes within one tick of the kernel's clock, at most 10 ms, may leave the same time, or within 2 s where the
    // file system keeps whole seconds; and a write sets the time when it begins: at this speed, in bytes per second, it
    // may go on for so long. One call writes MOST at most.
    static constexpr int64_t TICK = 50'000'000, COARSE = 2'100'000'000, SPEED = 50'000'000;
    static constexpr uint64_t MOST = 1ull << 31;

    static int64_t nanoseconds(int64_t seconds, int64_t rest) { return seconds * 1'000'000'000 + rest; }

    int descriptor_;
    uint64_t inode_;
    uint64_t generation_ = 0;
    bool unsettled_ = false;  // a later write could leave the time that was read last
    int64_t changed_ = 0;
    uint64_t size_ = 0;
};

std::map<std::pair<uint64_t, uint64_t>, std::weak_ptr<File>> g_files;  // by device and inode

// The file of a mapping, or null where it cannot be found by its path: it was deleted, or replaced by another.
std::shared_ptr<File> file_of(const Mapping& mapping) {
    int descriptor = open(mapping.path.c_str(), O_PATH | O_CLOEXEC);
    if (descriptor < 0) return nullptr;
    struct stat found;
    if (fstat(descriptor, &found) != 0 || found.st_ino != mapping.inode) {
        close(descriptor);
        return nullptr;
    }
    for (auto next = g_files.begin(); next != g_files.end();) next = next->second.expired() ? g_files.erase(next) : ++next;
    std::weak_ptr<File>& known = g_files[{found.st_dev, found.st_ino}];
    std::shared_ptr<File> file = known.lock();
    if (file != nullptr) {
        close(descriptor);
        return file;
    }
    known = file = std::make_shared<File>(descriptor, mapping.inode);
    return file;
}

// Huge pages of memory without a file are mapped as if they had one.
bool is_file(const Mapping& mapping) {
    return mapping.inode != 0 && mapping.path.compare(0, 15, "/anon_hugepage ") != 0;
}

#else
struct File {
    uint64_t generation() const { return 0; }
    void refresh() {}
};
std::shared_ptr<File> file_of(const Mapping&) { return nullptr; }
bool is_file(const Mapping&) { return false; }
#endif

using Files = std::vector<std::shared_ptr<File>>;

uint64_t generations(const Files& files) {  // each only grows
    uint64_t sum = 0;
    for (const auto& file : files) sum += file->generation();
    return sum;
}

}  // namespace
