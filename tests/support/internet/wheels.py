"""Makes a PyPI index in the folder given: `greet`, which needs `polite`."""

import hashlib
import pathlib
import sys
import zipfile


def wheel(index, name, body, needs=()):
    folder = index / name
    folder.mkdir(parents=True)
    path = folder / f"{name}-1.0-py3-none-any.whl"
    info = f"{name}-1.0.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"
    metadata += "".join(f"Requires-Dist: {need}\n" for need in needs)
    files = {
        f"{name}.py": body,
        f"{info}/METADATA": metadata,
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    names = [*files, f"{info}/RECORD"]
    files[f"{info}/RECORD"] = "".join(f"{name},,\n" for name in names)
    with zipfile.ZipFile(path, "w") as archive:
        for member, text in files.items():
            archive.writestr(member, text)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    link = f'<a href="{path.name}#sha256={digest}">{path.name}</a>'
    (folder / "index.html").write_text(f"<!DOCTYPE html><html><body>{link}</body></html>\n")


index = pathlib.Path(sys.argv[1])
wheel(index, "polite", "def please(text):\n    return text + ', please'\n")
wheel(index, "greet", "import polite\n\n\ndef greet(name):\n    return polite.please('hello ' + name)\n", ["polite>=1"])
