"""Private mappings of files, as `torch.load(mmap=True)` makes them: writes to the memory, and to the file."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from folding import KEPT, check, compiled, net
from torch import Tensor
from watching import accepted, sees

from normfx.weights.native import watches_pages
from normfx.weights.watch import Watch

SIZE = 1 << 18

REST = 0.1
"""Seconds until files of these sizes are believed."""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "weights of a model"
    np.arange(SIZE, dtype=np.float32).tofile(path)
    time.sleep(REST)  # a file that was written just now is not believed
    return path


def mapped(file: Path, size: int = SIZE) -> Tensor:
    return torch.from_file(str(file), shared=False, size=size)


def written(file: Path, place: int = 500_000) -> Callable[[], object]:
    """Another value in an entry, by a descriptor of its own that is opened now."""
    descriptor = os.open(file, os.O_RDWR)

    def write() -> None:
        os.pwrite(descriptor, bytes(value ^ 1 for value in os.pread(descriptor, 4, place)), place)

    return write


def test_the_process_writes_its_mapping(library: object, file: Path) -> None:
    tensor = mapped(file)
    watch = accepted([tensor])
    for index in (0, 70_000, SIZE - 1):
        assert sees(watch, [tensor], lambda index=index: tensor.data[index : index + 1].add_(1))


def test_the_file_is_written(library: object, file: Path) -> None:
    """Each page of the mapping that the process has not written itself changes with the file."""
    tensor = mapped(file)
    watch, write = accepted([tensor]), written(file)
    before = tensor.clone()
    write()
    assert not tensor.equal(before), "this system shows the file's contents in a private mapping"
    assert watch.changed([tensor])


def test_writes_within_a_tick_of_the_clock(library: object, file: Path) -> None:
    """The file has the same time when two writes follow each other: what was written just now is not believed yet."""
    tensor = mapped(file)
    watch, write = accepted([tensor]), written(file)
    for _ in range(200):
        write()
        assert watch.changed([tensor])
        watch.accept([tensor], watch.read([tensor]))


def test_a_write_that_takes_long(library: object, file: Path) -> None:
    """The time of the file is that at which the write began."""
    size = 1 << 24
    np.zeros(size, dtype=np.float32).tofile(file)
    tensor = mapped(file, size)[-1024:]
    content, descriptor = bytes(range(1, 256)) * (4 * size // 255), os.open(file, os.O_RDWR)
    watch = Watch([tensor])
    writer = threading.Thread(target=os.pwrite, args=(descriptor, content, 0))
    writer.start()
    seen = tensor.clone()
    while writer.is_alive():
        stamps, seen = watch.read([tensor]), tensor.clone()
        watch.accept([tensor], stamps)
        time.sleep(0.002)
    assert watch.changed([tensor]) or tensor.equal(seen)
    assert tensor.count_nonzero(), "the write has come to an end"


BY_PAGES = pytest.mark.skipif(not watches_pages(), reason="this kernel does not tell which pages were written")


def watching(file: Path) -> list[int]:
    """The descriptors by which watches look at a file: those that can neither read nor write."""
    links = [link for link in Path("/proc/self/fd").iterdir() if link.is_symlink() and link.readlink() == file]
    states = {int(link.name): Path(f"/proc/self/fdinfo/{link.name}").read_text() for link in links}
    return [number for number, state in states.items() if int(state.split("flags:")[1].split()[0], 8) & os.O_PATH]


@BY_PAGES
def test_descriptors_are_given_back(file: Path) -> None:
    for _ in range(3):
        tensor = mapped(file)
        watch = accepted([tensor])
        assert len(watching(file)) == 1
        del watch
        assert not watching(file)


@BY_PAGES
def test_a_descriptor_that_the_program_closes(file: Path) -> None:
    """As daemons do that close all of them: its number may be another file's then, which is left open."""
    tensor = mapped(file)
    watch, write = accepted([tensor]), written(file)
    (number,) = watching(file)
    os.dup2(os.open(file.with_name("other"), os.O_CREAT | os.O_RDWR), number)
    for _ in range(2):
        write()
        assert watch.changed([tensor])
        watch.accept([tensor], watch.read([tensor]))
    del watch
    os.fstat(number)


def test_a_file_at_rest_is_believed_again(library: object, file: Path) -> None:
    tensor = mapped(file)
    watch = accepted([tensor])
    written(file)()
    assert watch.changed([tensor])
    time.sleep(REST)
    watch.accept([tensor], watch.read([tensor]))
    watch.accept([tensor], watch.read([tensor]))
    assert not watch.changed([tensor])


@pytest.mark.parametrize("gone", ["deleted", "replaced", "renamed"])
@pytest.mark.parametrize("when", ["before", "later"])
def test_files_that_have_another_path(library: object, file: Path, gone: str, when: str) -> None:
    tensor, write = mapped(file), written(file)

    def go() -> None:
        if gone == "deleted":
            file.unlink()
        elif gone == "renamed":
            file.rename(file.with_name("elsewhere"))
        else:
            other = file.with_name("other")
            other.write_bytes(bytes(4 * SIZE))
            other.replace(file)

    if when == "before":
        go()
        time.sleep(REST)
    watch = accepted([tensor])
    if when == "later":
        go()
        time.sleep(REST)
        watch.accept([tensor], watch.read([tensor]))
        watch.accept([tensor], watch.read([tensor]))
        assert not watch.changed([tensor])
    write()
    assert watch.changed([tensor])


def test_two_files(library: object, file: Path) -> None:
    """Each watch compares the files of its own tensors; what one watch has looked at, the other still sees."""
    second = file.with_name("second")
    second.write_bytes(file.read_bytes())
    time.sleep(REST)
    one, two = mapped(file), mapped(second)
    of_one, of_both = accepted([one]), accepted([one, two])
    written(second)()
    assert not of_one.changed([one])
    assert of_both.changed([one, two])
    written(file)()
    assert of_both.changed([one, two])
    assert of_one.changed([one])


@pytest.mark.parametrize("fold", KEPT)
def test_folds_follow_the_file(fold: str, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save(net(width=80).state_dict(), path)
    model = net(width=80)
    model.load_state_dict(torch.load(path, mmap=True), assign=True)
    call = compiled(model, fold)
    before = check(call, model)
    for factor in (3.0, 0.5, 0.5):
        overwrite(path, factor)
        before = check(call, model, before)
    time.sleep(REST)
    check(call, model)
    overwrite(path, 2.0)
    check(call, model, before)


def overwrite(path: Path, factor: float) -> None:
    """Other values where a large weight is in the file, without truncating it."""
    weight = torch.load(path)["up.weight"].numpy()
    place = path.read_bytes().index(weight.tobytes())
    with path.open("r+b") as opened:
        opened.seek(place)
        opened.write((weight * factor).tobytes())
