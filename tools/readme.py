"""Write README.md and its pictures, and the tables of docs/course.md and docs/handbook.md

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
        src = re.sub(r'\]\(\.\./([\w/]+\.md)\)', r'](\1)', src)
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
        data = o.get('data', {})
        number = len(pictures) + 1
        if 'image/svg+xml' in data:
            name = f'docs/pictures/index_{number}.svg'
            svg = ''.join(data['image/svg+xml'])
            pictures[name] = svg.encode()
            words = re.search('aria-label="([^"]*)"', svg)[1]
        elif 'image/png' in data:
            name = f'docs/pictures/index_{number}.png'
            pictures[name] = base64.b64decode(''.join(data['image/png']))
            words = 'What the text around it says, computed in nbs/index.ipynb'
        else:
            continue
        parts.append(f'![{words}]({name})')
    return '\n\n'.join(parts)


def opening(path):
    "Title, subtitle and stated minutes of a notebook"
    cells = json.loads((root / 'nbs' / path).read_text(encoding='utf-8'))['cells']
    title, subtitle = re.match(r'# ([^\n]+)\n\n> ([^\n]+)', ''.join(cells[0]['source'])).groups()
    minutes = re.search(r'\*\*Time\*\* (\d+) min', ''.join(cells[1]['source']))
    return title, subtitle, minutes and minutes[1]


def course():
    "docs/course.md with titles, minutes and subtitles as its chapters state them"

    def row(m):
        title, subtitle, minutes = opening(m['path'])
        return f'| {m["section"]} | [{title}](../nbs/{m["path"]}) | {minutes} | {subtitle} |'

    page = (root / 'docs' / 'course.md').read_text(encoding='utf-8')
    pattern = r'^\| (?P<section>[^|]*?) ?\| \[[^\]]*\]\(\.\./nbs/(?P<path>[^)]+)\) \|.*$'
    return re.sub(pattern, row, page, flags=re.M)


def handbook():
    "docs/handbook.md with a row for each part, as its opening page describes it"
    page = (root / 'docs' / 'handbook.md').read_text(encoding='utf-8')
    rows = []
    for path in sorted((root / 'nbs').glob('[0-9]*/index.ipynb')):
        folder = path.parent.name
        title, subtitle, _ = opening(f'{folder}/index.ipynb')
        rows.append(f'| {int(folder[:2])} | [{title}](../nbs/{folder}/index.ipynb) | {subtitle} |')
    head = '| part | | what it is about |\n|---|---|---|\n'
    return re.sub(r'\| part \|.*?(?=\n\n)', lambda _: head + '\n'.join(rows), page, flags=re.S)


def made():
    "Every file that comes from notebooks here, by its path"
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
    return {
        'README.md': text.encode(),
        'docs/course.md': course().encode(),
        'docs/handbook.md': handbook().encode(),
        **pictures,
    }


if __name__ == '__main__':
    files = made()
    there = {str(p.relative_to(root)) for p in root.glob('docs/pictures/index_*')}
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
