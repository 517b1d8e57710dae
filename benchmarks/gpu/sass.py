"""Counts the instructions that a compiled kernel executes for an element.

The input is the disassembly of ``nvdisasm -c``. The counts are those of the loop in which a kernel
reads and writes 16 bytes at once, or of the whole kernel if it has no such loop. Of all paths
through it, the shortest one with the stated number of such accesses is taken, which leaves out what
is executed rarely: the ends of tensors, operands that are not aligned, sums that are moved to
shared memory.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

# The instructions of each pipe, and the lanes that a processor of compute capability 9.0 executes
# in a clock cycle (CUDA C++ Programming Guide, "Arithmetic Instructions"). Every instruction also
# takes one of the 128 lanes that its four schedulers issue.
ISSUE = 128
PIPES = {
    "fma": (128, r"FFMA|FMUL|FADD|HFMA2|HADD2|HMUL2"),
    "imad": (64, r"IMAD"),
    "mufu": (16, r"MUFU|F2F\.|F2I|I2F|FRND"),
    "fp64": (64, r"D(FMA|MUL|ADD|SETP)"),
    "memory": (32, r"LD|ST|ATOM|RED"),
    "branch": (64, r"BRA|EXIT|BS|BAR|WARPSYNC|NOP|CALL|RET|DEPBAR|YIELD|U[A-Z]|R2UR|S2R|CS2R"),
    "alu": (64, r""),  # integers, logic, comparisons, selections, packing
}  # fmt: skip
WIDE_LOAD = re.compile(r"LDG\S*\.128|LDG\S*\.64\.64|LDGSTS\S*\.128")
WIDE_STORE = re.compile(r"STG\S*\.128")
_INSTRUCTION = re.compile(
    r"/\*[0-9a-f]{4,}\*/\s+(?P<guard>@!?U?P\w+\s+)?(?P<name>[A-Z][\w.]*)(?P<rest>[^;]*);"
)
_LABEL = re.compile(r"^(\.L_\w+):")


def pipe_of(name: str) -> str:
    """The pipe that executes an instruction."""
    return next(pipe for pipe, (_, names) in PIPES.items() if re.match(names, name))


@dataclass
class Block:
    """Instructions that are executed one after the other, and the blocks that can follow."""

    names: list[str] = field(default_factory=list)
    next: list[int] = field(default_factory=list)


def functions(disassembly: str) -> Iterator[tuple[str, list[str]]]:
    """The name and the lines of each kernel."""
    for part in re.split(r"^\.text\.", disassembly, flags=re.M)[1:]:
        name, _, body = part.partition(":")
        yield name, re.split(r"^\s*\.section", body, maxsplit=1, flags=re.M)[0].splitlines()


def blocks_of(lines: list[str]) -> list[Block]:
    """The control flow of a kernel."""
    blocks, labels, targets = [Block()], {}, []
    for line in lines:
        if label := _LABEL.match(line):
            if blocks[-1].names:
                blocks.append(Block())
                targets.append((len(blocks) - 2, len(blocks) - 1))
            labels[label[1]] = len(blocks) - 1
            continue
        found = _INSTRUCTION.search(line)
        if found is None:
            continue
        name, rest, guard = found["name"], found["rest"], found["guard"]
        blocks[-1].names.append(name)
        if name.split(".")[0] not in ("BRA", "EXIT"):
            continue
        here = len(blocks) - 1
        if target := re.search(r"`\((\.L_\w+)\)", rest):
            targets.append((here, target[1]))
        blocks.append(Block())
        if guard or re.search(r"!?U?P\d", rest.split("`")[0]):  # otherwise nothing follows it
            targets.append((here, here + 1))
    for source, target in targets:
        place = labels.get(target) if isinstance(target, str) else target
        if place is not None and place < len(blocks):
            blocks[source].next.append(place)
    return blocks


def loops_of(blocks: list[Block]) -> list[tuple[int, set[int]]]:
    """The head and the blocks of each loop, the smallest first."""
    before: dict[int, set[int]] = {}
    for i, block in enumerate(blocks):
        for following in block.next:
            before.setdefault(following, set()).add(i)
    loops = {}
    for source, block in enumerate(blocks):
        for head in block.next:
            if head > source:
                continue
            inside, todo = {head}, [source]
            while todo:
                node = todo.pop()
                if node not in inside:
                    inside.add(node)
                    todo.extend(before.get(node, ()))
            loops.setdefault(head, set()).update(inside)
    return sorted(loops.items(), key=lambda loop: len(loop[1]))


def counts(lines: list[str], loads: int, stores: int) -> tuple[Counter[str], int] | None:
    """Instructions by pipe and the number of repeats of ``loads`` and ``stores`` that they do.

    A kernel may do several packs at once; the path has a multiple of the stated stores. It may have
    more loads, because those of an operand that is absent are skipped by a predicate.
    """
    blocks = blocks_of(lines)
    for head, inside in [*loops_of(blocks), (0, set(range(len(blocks))))]:
        found = _shortest(blocks, head, inside)
        for times in (8, 4, 2, 1):
            fits = [
                mix for (n_loads, n_stores), mix in found.items()
                if n_stores == stores * times and n_loads >= loads * times
            ]  # fmt: skip
            if fits:
                return min(fits, key=Counter.total), times
    return None


def _shortest(
    blocks: list[Block], head: int, inside: set[int]
) -> dict[tuple[int, int], Counter[str]]:
    """For each number of wide loads and stores, the path with the fewest instructions.

    The path starts at the head and ends where it is reached again, or where the kernel ends. Blocks
    are visited in the order of their addresses, and inner loops are passed through once.
    """
    whole = head == 0 and len(inside) == len(blocks)
    best: dict[int, dict[tuple[int, int], Counter[str]]] = {head: {(0, 0): Counter()}}
    ends: dict[tuple[int, int], Counter[str]] = {}
    order = _topological(blocks, head, inside)
    place = {node: i for i, node in enumerate(order)}
    for node in order:
        block = blocks[node]
        wide = (
            sum(bool(WIDE_LOAD.match(n)) for n in block.names),
            sum(bool(WIDE_STORE.match(n)) for n in block.names),
        )
        mix = Counter(pipe_of(n) for n in block.names)
        for (loads, stores), so_far in best.get(node, {}).items():
            key, total = (loads + wide[0], stores + wide[1]), so_far + mix
            leaves = not block.next if whole else head in block.next
            if leaves:
                _keep(ends, key, total)
            for following in block.next:
                if place.get(following, -1) > place[node]:
                    _keep(best.setdefault(following, {}), key, total)
    return ends


def _keep(found: dict[tuple[int, int], Counter[str]], key: tuple[int, int], mix: Counter) -> None:
    if key not in found or mix.total() < found[key].total():
        found[key] = mix


def _topological(blocks: list[Block], head: int, inside: set[int]) -> list[int]:
    """The blocks of a region, each after those that lead to it; edges that close loops aside."""
    order: list[int] = []
    state: dict[int, bool] = {}
    stack = [(head, iter(blocks[head].next))]
    state[head] = True
    while stack:
        node, following = stack[-1]
        for child in following:
            if child in inside and child not in state:
                state[child] = True
                stack.append((child, iter(blocks[child].next)))
                break
        else:
            order.append(node)
            stack.pop()
    return order[::-1]


def cycles(mix: Counter[str]) -> tuple[float, str]:
    """Clock cycles of a processor for one warp's worth of lanes / 32, and what limits them."""
    times = {pipe: mix[pipe] / lanes for pipe, (lanes, _) in PIPES.items()}
    times["fma"] += times.pop("imad")  # the same pipe
    times["issue"] = mix.total() / ISSUE
    limit = max(times, key=lambda pipe: times[pipe])
    return times[limit], limit


def passes(lines: list[str], count: int, size: int) -> Counter[str]:
    """The instructions for an element of a kernel that reads a row ``count`` times, in loops.

    An element has ``size`` bytes. A loop that the compiler has unrolled also has a short loop for
    the rest of a row, which is left out.
    """
    blocks = blocks_of(lines)
    found: list[tuple[int, Counter[str]]] = []
    seen: set[int] = set()
    for head, inside in loops_of(blocks):
        loads = [n for i in inside for n in blocks[i].names if n.startswith("LDG")]
        elements = sum(16 // size if WIDE_LOAD.match(n) else 1 for n in loads)
        if elements and not inside & seen:
            seen |= inside
            path = min(_shortest(blocks, head, inside).values(), key=Counter.total)
            found.append((elements, path))
    total = Counter[str]()
    for elements, path in sorted(found, key=lambda loop: -loop[0])[:count]:
        total += Counter({pipe: n / elements for pipe, n in path.items()})  # type: ignore[misc]
    return total
