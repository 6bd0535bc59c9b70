"""Check that no code for one instruction set can be linked into the rest of a program.

An inline function or template that an AVX-512 object file offers as a weak symbol may be the copy
that the linker keeps for everybody, and then kills older processors. So the only symbol that an
object file of an instruction set may define for others is its table, `bnext::kernels_<id>`, and
nothing in it may run when the program loads.

    python tools/check_isa_symbols.py build/release/libbnext.a
"""

import re
import subprocess
import sys


def main(library: str) -> int:
    listing = subprocess.run(
        ["nm", "-A", "-C", "--defined-only", library], check=True, capture_output=True, text=True
    ).stdout
    tables, leaks = [], []
    for line in listing.splitlines():
        location, _, symbol = line.partition(" ")
        if "table.cpp" not in location:
            continue
        kind, _, name = symbol.lstrip("0123456789abcdef").strip().partition(" ")
        if "_GLOBAL__sub_I" in name:
            leaks.append(f"{location} runs {name} at load")
        elif re.fullmatch(r"bnext::kernels_\w+", name):
            tables.append(name)
        elif kind in "uvw" or kind.isupper():
            leaks.append(f"{location} defines {kind} {name}")
    if not tables:
        leaks.append(f"{library}: found no table of an instruction set")
    print("\n".join(leaks or [f"{len(tables)} tables, nothing else is visible: {tables}"]))
    return 1 if leaks else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
