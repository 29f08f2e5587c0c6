"""Write README.md and its pictures from nbs/index.ipynb

`python tools/readme.py`, or `--check` to see whether they are up to date.
"""

import base64
import json
import re
import sys
from configparser import ConfigParser
from pathlib import Path

root = Path(__file__).resolve().parents[1]


def shown(cell, pictures):
    "A cell as plain markdown; pictures of its outputs are added to `pictures`"
    src = ''.join(cell['source'])
    if cell['cell_type'] == 'markdown':
        src = re.sub(
            r'^:::.*\n?', '', src, flags=re.M
        )  # Quarto's fences mean nothing on a code host
        return re.sub(
            r'\]\(((?:\w+/)*\w+\.ipynb)\)', r'](nbs/\1)', src
        )  # chapters are one folder down from here
    if re.match(r'#\s*\|\s*hide', src):
        return ''
    out = ''.join(''.join(o.get('text', '')) for o in cell['outputs'] if o.get('name') == 'stdout')
    parts = [] if re.match(r'#\s*\|\s*echo:\s*false', src) else [f'```python\n{src}\n```']
    if out:
        parts.append(f'```\n{out.rstrip()}\n```')
    for o in cell['outputs']:
        if not (png := o.get('data', {}).get('image/png')):
            continue
        name = f'docs/pictures/index_{len(pictures) + 1}.png'
        pictures[name] = base64.b64decode(''.join(png))
        parts.append(f'![What the text around it says, computed in nbs/index.ipynb]({name})')
    return '\n\n'.join(parts)


def made():
    "Every file that comes from the index, by its path"
    parser = ConfigParser(delimiters=['='])
    parser.read(root / 'settings.ini', encoding='utf-8')
    cells = json.loads((root / 'nbs' / parser['DEFAULT']['readme_nb']).read_text(encoding='utf-8'))[
        'cells'
    ]
    pictures = {}
    text = (
        '<!-- made from nbs/index.ipynb by tools/readme.py: edit there -->\n\n'
        + '\n\n'.join(filter(None, (shown(c, pictures) for c in cells)))
        + '\n'
    )
    return {'README.md': text.encode(), **pictures}


if __name__ == '__main__':
    files = made()
    there = {str(p.relative_to(root)) for p in root.glob('docs/pictures/index_*.png')}
    if '--check' in sys.argv:
        stale = [
            n for n, b in files.items() if not (root / n).exists() or (root / n).read_bytes() != b
        ] + sorted(there - files.keys())
        if stale:
            sys.exit(
                f'{", ".join(stale)}: not what nbs/index.ipynb says; run python tools/readme.py'
            )
    else:
        for n in there - files.keys():
            (root / n).unlink()
        for n, b in files.items():
            (root / n).parent.mkdir(exist_ok=True)
            (root / n).write_bytes(b)
