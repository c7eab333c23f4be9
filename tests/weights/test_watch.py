"""Watches of memory: what is seen, with and without the kernel's help, and what identifies a tensor."""

from __future__ import annotations

import ctypes
import mmap
import os
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from watching import accepted, sees

from normfx.errors import NormfxWarning
from normfx.weights import native
from normfx.weights.samples import EVERY, Contents, Samples
from normfx.weights.watch import Watch, identity

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.complex128, torch.int8]


def entry(tensor: Tensor, index: int) -> Callable[[], object]:
    flat = tensor.detach().view(torch.uint8).reshape(-1).numpy()

    def write() -> None:
        flat[index] ^= 1

    return write


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 3, 100, 5000, 300_000])
def test_one_bit_anywhere_is_seen(library: object, dtype: torch.dtype, size: int) -> None:
    tensors = [torch.ones(size, dtype=torch.float32).to(dtype), torch.ones(7)]
    watch = accepted(tensors)
    last = tensors[0].nbytes - 1
    for index in {0, 1 % (last + 1), last // 3, last // 2, max(last - 4097, 0), last}:
        assert sees(watch, tensors, entry(tensors[0], index)), index
    assert sees(watch, tensors, entry(tensors[1], 27))


def test_signs_of_all_entries(library: object) -> None:
    """The highest bit of every word changes: a hash that only multiplies would not tell two of them from none."""
    tensors = [torch.randn(n, dtype=torch.float64) for n in (1, 2, 8, 9, 16, 17, 64, 1000, 100_000)]
    watch = accepted(tensors)
    for tensor in tensors:
        assert sees(watch, tensors, lambda tensor=tensor: tensor.data.neg_())
    for tensor in tensors[1:]:
        assert sees(watch, tensors, lambda tensor=tensor: tensor.data[:2].neg_())


def test_watched_by_pages_where_the_kernel_helps() -> None:
    """What this file tests with `pages` is not the same as without."""
    library = native.native_library()
    assert library is not None
    if not native.watches_pages():
        pytest.skip("this kernel does not tell which pages were written")
    before = library.normfx_blocks(1)
    tensors = [torch.randn(100_000), torch.randn(10)]
    watch = accepted(tensors)
    assert library.normfx_blocks(1) == before + 2
    del watch
    assert library.normfx_blocks(1) == before


def test_untouched_zeros(library: object) -> None:
    """Pages that nothing has touched yet are not in the page table."""
    tensors = [torch.zeros(1 << 20)]
    watch = accepted(tensors)
    assert sees(watch, tensors, lambda: tensors[0].data[500_000:500_001].fill_(1))


def test_layouts_are_part_of_the_identity(library: object) -> None:
    square = torch.randn(64, 64)
    forms = [square, square.t(), square[:32], square.view(-1), square.view(torch.int32), square[:, :64:2], square[1:]]
    assert len(set(map(identity, forms))) == len(forms)
    for form in forms:
        watch = accepted([form])
        for other in forms:
            assert watch.changed([other]) == (other is not form)
        assert [watch.read([o]) != watch.read([o]) for o in forms] == [o is not form for o in forms]
    parameter = torch.nn.Parameter(square.clone())
    watch = accepted([parameter])
    parameter.data = parameter.data.t()  # the same object, storage and address
    assert watch.changed([parameter])
    conjugate = torch.randn(4, dtype=torch.complex64)
    assert identity(conjugate) != identity(conjugate.conj())


def test_every_alias_of_the_memory(library: object) -> None:
    """One memory with several storages, tensors and version counters: a write through any is seen through all."""
    buffer = np.zeros(1 << 18, dtype=np.float32)
    whole, part = torch.from_numpy(buffer), torch.from_numpy(buffer[1000:200_000])
    tensors = [whole, part, whole[5000:100_000], torch.nn.Parameter(whole.data)]
    watches = [accepted([tensor]) for tensor in tensors]
    for position in (50_000, 50_001):
        buffer[position] += 1
        for watch, tensor in zip(watches, tensors, strict=True):
            assert sees(watch, [tensor], lambda: None)
    buffer[3000] += 1
    assert [w.changed([t]) for w, t in zip(watches, tensors, strict=True)] == [True, True, False, True]


def test_what_comes_back_is_still_a_change_to_whom_it_was_not_shown(library: object) -> None:
    """A, B, A: who looked at B makes A's epoch a new one."""
    for size in (8, 100_000):
        tensor = torch.randn(size)
        kept = tensor.clone()
        first, second = accepted([tensor]), accepted([tensor])
        tensor.data.zero_()
        assert second.changed([tensor])
        second.accept([tensor], second.read([tensor]))
        tensor.data.copy_(kept)
        assert first.changed([tensor]), "a value shared with the second watch was computed from the zeros"


def test_memory_shared_with_other_processes(library: object, tmp_path: Path) -> None:
    """Another process, or another mapping of the same file, writes: this one's page table does not show it."""
    file = tmp_path / "weights"
    file.write_bytes(bytes(1 << 20))
    shared = torch.from_file(str(file), shared=True, size=1 << 18)
    watch = accepted([shared])
    with file.open("r+b") as opened, mmap.mmap(opened.fileno(), 0) as other:
        assert sees(watch, [shared], lambda: other.__setitem__(500_000, 7))
    parameter = torch.randn(1 << 18).share_memory_()
    watch = accepted([parameter])

    def in_a_child() -> None:
        child = os.fork()
        if child == 0:
            parameter.numpy()[77_777] = 5.0
            os._exit(0)
        os.waitpid(child, 0)

    assert sees(watch, [parameter], in_a_child)


def test_writes_of_the_kernel(library: object, tmp_path: Path) -> None:
    """`readinto` writes without a store instruction of the process."""
    file = tmp_path / "weights"
    file.write_bytes(os.urandom(400_000))
    tensor = torch.zeros(100_000)
    watch = accepted([tensor])
    with file.open("rb", buffering=0) as opened:
        assert sees(watch, [tensor], lambda: opened.readinto(memoryview(tensor.numpy()).cast("B")[8192:16384]))


def test_freed_and_filled_again(library: object) -> None:
    tensor = torch.randn(100_000)
    watch = accepted([tensor])
    size = tensor.untyped_storage().nbytes()
    tensor.untyped_storage().resize_(0)
    assert watch.changed([tensor])
    stamps = watch.read([tensor])
    assert stamps != watch.read([tensor])
    watch.accept([tensor], stamps)
    assert watch.changed([tensor]), "what could not be read is not believed"
    tensor.untyped_storage().resize_(size)
    tensor.data.fill_(1.0)
    again = accepted([tensor])
    assert sees(again, [tensor], entry(tensor, 200_000))


def test_another_mapping_at_the_same_place(library: object) -> None:
    """The kernel forgets what it watched when the memory is mapped again; normfx must not take silence for peace."""
    with mmap.mmap(-1, 1 << 20) as memory:
        tensor = torch.frombuffer(memory, dtype=torch.float32)
        watch = accepted([tensor])
        if hasattr(memory, "madvise"):
            tensor.data.fill_(3.0)
            watch.accept([tensor], watch.read([tensor]))
            memory.madvise(mmap.MADV_DONTNEED)
        assert sees(watch, [tensor], tensor.data[1000:1001].zero_)
        del tensor, watch


def test_in_a_forked_child(library: object) -> None:
    """The kernel's watch does not follow into the child; both see their own writes, and only those."""
    tensors = [torch.randn(100_000), torch.randn(10)]
    watch = accepted(tensors)
    child = os.fork()
    if child == 0:
        watch.accept(tensors, watch.read(tensors))
        good = not watch.changed(tensors) and sees(watch, tensors, entry(tensors[0], 50_000))
        os._exit(0 if good and sees(watch, tensors, entry(tensors[1], 5)) else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert not watch.changed(tensors)
    assert sees(watch, tensors, entry(tensors[0], 50_000))


def test_neighbours_on_one_page(library: object) -> None:
    """Small tensors share pages with others: what is written there is not theirs, however often."""
    buffer = np.zeros(40_000, dtype=np.float32)
    neighbours = [torch.from_numpy(buffer[begin : begin + 700]) for begin in range(3, 39_000, 701)]
    watches = [accepted([tensor]) for tensor in neighbours]
    for time in range(30):  # more often than normfx goes on asking the kernel for such a page
        written = time % 5 + 20
        neighbours[written].data[time * 20] = 1.0 + time
        for i, (watch, tensor) in enumerate(zip(watches, neighbours, strict=True)):
            assert sees(watch, [tensor], lambda: None) == (i == written)
    both = accepted([neighbours[20], neighbours[24]])
    for i in (20, 24):
        assert sees(
            both,
            [neighbours[20], neighbours[24]],
            neighbours[i].data[699:].neg_ if i == 24 else neighbours[i].data[:1].zero_,
        )


def test_a_new_watch_changes_nothing_for_the_old(library: object) -> None:
    """Blocks on pages that are written all the time too."""
    buffer = np.zeros(3000, dtype=np.float32)
    tensors = [torch.from_numpy(buffer[begin : begin + size]) for begin, size in ((10, 50), (100, 1500), (2000, 7))]
    watch = accepted(tensors)
    for time in range(20):
        buffer[[5, 80, 90, 1700, 1999, 2100]] = 1.0 + time
        assert not watch.changed(tensors)
        other = accepted(tensors)
        assert not watch.changed(tensors) and not other.changed(tensors)


def test_another_mapping_in_a_gap(library: object) -> None:
    """What lies between two tensors may be unmapped, and be other memory later."""
    library_of_c = ctypes.CDLL(None)
    map_memory, unmap = library_of_c.mmap, library_of_c.munmap
    map_memory.restype, map_memory.argtypes = (
        ctypes.c_void_p,
        [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long],
    )
    unmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    with mmap.mmap(-1, 60 * mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        whole = torch.frombuffer(memory, dtype=torch.float32)
        whole.fill_(1.0)
        page = mmap.PAGESIZE // 4
        tensors = [whole[5 : 10 * page], whole[50 * page : 60 * page - 5], whole[11 * page + 1 : 11 * page + 9]]
        watch = accepted(tensors)
        gap, size = whole.data_ptr() + 20 * mmap.PAGESIZE, 10 * mmap.PAGESIZE
        fixed = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x10
        for change in (lambda: unmap(gap, size), lambda: map_memory(gap, size, 3, fixed, -1, 0), lambda: None):
            change()
            assert not watch.changed(tensors)
            for tensor in tensors:
                for index in (0, 4, -1):
                    assert sees(watch, tensors, tensor.data[index].neg_)
        assert map_memory(gap, size, 3, fixed, -1, 0) == gap, "there must be memory again when it is given back"
        del whole, tensors, tensor, watch, change


@pytest.mark.parametrize("seed", range(4))
def test_random_writes(library: object, seed: int) -> None:
    """Overlapping blocks of one memory, watches that come and go, random writes: compared with copies of them."""
    choose = random.Random(seed)
    size = 16 * mmap.PAGESIZE
    buffer = np.zeros(size, dtype=np.uint8)

    def watched() -> tuple[Watch, list[Tensor], list[Tensor]]:
        tensors = []
        for _ in range(choose.randint(1, 5)):
            begin = choose.randrange(size)
            end = min(size, begin + choose.choice([1, 50, 3000, 5000, 20_000, size]))
            tensors.append(torch.from_numpy(buffer[begin:end]))
        return accepted(tensors), tensors, [t.clone() for t in tensors]

    watches = [watched() for _ in range(6)]
    for step in range(1200):
        begin = choose.randrange(size)
        buffer[begin : begin + choose.choice([1, 7, 5000])] = step % 251 + 1
        if choose.random() < (0.3, 0.01)[seed % 2]:
            watches[choose.randrange(len(watches))] = watched()
        for i, (watch, tensors, known) in enumerate(watches):
            if choose.random() < 0.3:
                continue
            differs = not all(map(torch.equal, tensors, known))
            stamps = watch.read(tensors)
            assert watch.changed(tensors) or not differs
            if choose.random() < 0.5:
                watch.accept(tensors, stamps)
                watches[i] = watch, tensors, [t.clone() for t in tensors]
                assert not watch.changed(tensors)


def test_nothing_grows(library: object) -> None:
    before = library.normfx_blocks(0)
    for _ in range(50):
        tensors = [torch.randn(50_000), torch.randn(3)]
        accepted(tensors)
    assert library.normfx_blocks(0) <= before


@pytest.mark.parametrize("dtype", DTYPES)
def test_samples_of_devices(dtype: torch.dtype) -> None:
    """Here on the CPU: what is read is the same."""
    tensors = [torch.randn(8, 10).to(dtype).t(), torch.randn(3).to(dtype), torch.randn(0).to(dtype)]
    samples = Samples(tensors)
    seen = samples.read(tensors)
    assert [len(group) > 0 for group in seen] == [True, True, False]
    tensors[1].data.fill_(7)
    assert samples.read(tensors)[1] != seen[1] and samples.read(tensors)[0] == seen[0]
    tensors[0].data.fill_(7)
    assert samples.read(tensors)[0] != seen[0]


def test_contents_of_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here on the CPU: versions tell in each call; samples, which wait for a device, are read ever more rarely."""
    reads: list[list[Tensor]] = []
    read = Samples.read
    monkeypatch.setattr(Samples, "read", lambda self, tensors: reads.append(tensors) or read(self, tensors))
    tensors = [torch.randn(8, 10), torch.randn(3)]
    contents = Contents(tensors)
    seen = contents.read(tensors)
    counts = []
    for _ in range(3 * EVERY):
        assert not contents.changed(tensors, seen)
        counts.append(len(reads))
    assert [i + 1 for i in range(1, 3 * EVERY) if counts[i] > counts[i - 1]] == [2, 4, 8, 16, 32, 64, 128, 192]
    tensors[1].add_(1)
    assert contents.changed(tensors, seen) and len(reads) == counts[-1]  # by its version
    seen = contents.read(tensors)
    for _ in range(5):
        assert not contents.changed(tensors, seen)
    tensors[0].data.fill_(7)
    assert [contents.changed(tensors, seen) for _ in range(2)] == [False, False]
    for _ in range(2):  # the eighth call sees it; and so does the next, in case the warning was raised
        with pytest.warns(NormfxWarning, match="refold"):
            assert contents.changed(tensors, seen)
    seen = contents.read(tensors)
    assert not contents.changed(tensors, seen)


@pytest.mark.parametrize("size", [3, 100_000])
def test_where_python_keeps_a_tensor_is_not_known(monkeypatch: pytest.MonkeyPatch, library: object, size: int) -> None:
    """Then torch is asked for the address of each."""
    monkeypatch.setattr("normfx.weights.watch._payload", lambda: None)
    tensors = [torch.randn(size), torch.nn.Parameter(torch.randn(5))]
    watch = accepted(tensors)
    assert sees(watch, tensors, entry(tensors[0], size))
    assert watch.changed(tensors[::-1]) and watch.changed([tensors[0], torch.randn(5)]) and not watch.changed(tensors)


def test_without_a_compiler_nothing_is_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("normfx.weights.watch.native_library", lambda: None)
    tensors = [torch.randn(10)]
    watch = Watch(tensors)
    watch.accept(tensors, watch.read(tensors))
    assert not watch.trackable and watch.changed(tensors)
