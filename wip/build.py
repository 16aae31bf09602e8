"""percent script -> notebook.  %% md / %% code [check] [hide];  a line `ALT ...` right after %% code gives metadata alt."""
import json, sys, pathlib, re, uuid
src, target = map(pathlib.Path, sys.argv[1:3])
old = json.loads(target.read_text())
setup = next(c for c in old["cells"] if "setup" in c["metadata"].get("tags", []))
cells = []
for block in re.split(r"^%% ", src.read_text(), flags=re.M)[1:]:
    head, _, body = block.partition("\n")
    words = head.split()
    meta = {}
    if body.startswith("ALT "):
        alt, _, body = body.partition("\n")
        meta["alt"] = alt[4:]
    body = body.strip("\n")
    if words[0] == "setup":
        cells.append(setup); continue
    kind = "markdown" if words[0] == "md" else "code"
    tags = []
    if "hide" in words:
        meta["jupyter"] = {"source_hidden": True}; tags.append("hide-input")
    if "check" in words: tags.append("nbval-check-output")
    if tags: meta["tags"] = tags
    slide = "-"
    if kind == "markdown" and re.match(r"#{1,2} ", body): slide = "slide"
    if "hide" in words: slide = "subslide"
    meta["slideshow"] = {"slide_type": slide}
    cell = {"cell_type": kind, "id": f"c{len(cells):02d}", "metadata": dict(sorted(meta.items())), "source": body.splitlines(keepends=True)}
    if kind == "code": cell |= {"execution_count": None, "outputs": []}
    cells.append(cell)
old["cells"] = cells
target.write_text(json.dumps(old, indent=1, ensure_ascii=False) + "\n")
print(len(cells), "cells")
