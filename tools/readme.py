"Write README.md from nbs/index.ipynb: `python tools/readme.py`, or `--check` to see whether it is up to date"
import json, re, sys
from configparser import ConfigParser
from pathlib import Path

root = Path(__file__).resolve().parents[1]

def shown(cell):
    "A cell as plain markdown"
    src = ''.join(cell['source'])
    if cell['cell_type'] == 'markdown':
        src = re.sub(r'^:::.*\n?', '', src, flags=re.M)                    # Quarto's fences mean nothing on a code host
        return re.sub(r'\]\((\w+\.ipynb)\)', r'](nbs/\1)', src)            # chapters are one folder down from here
    if re.match(r'#\s*\|\s*hide', src): return ''
    out = ''.join(''.join(o.get('text', '')) for o in cell['outputs'] if o.get('name') == 'stdout')
    return f'```python\n{src}\n```' + (f'\n\n```\n{out.rstrip()}\n```' if out else '')

def readme():
    parser = ConfigParser(delimiters=['='])
    parser.read(root/'settings.ini', encoding='utf-8')
    cells = json.loads((root/'nbs'/parser['DEFAULT']['readme_nb']).read_text(encoding='utf-8'))['cells']
    return '<!-- made from nbs/index.ipynb by tools/readme.py: edit there -->\n\n' + '\n\n'.join(filter(None, map(shown, cells))) + '\n'

if __name__ == '__main__':
    if '--check' in sys.argv:
        if (root/'README.md').read_text(encoding='utf-8') != readme(): sys.exit('README.md is not what nbs/index.ipynb says: run python tools/readme.py')
    else: (root/'README.md').write_text(readme(), encoding='utf-8')
