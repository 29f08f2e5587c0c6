"""Compare Eva with DeepSeek's own inference code, and store the figures

`python tools/deepseek_code.py DeepSeek-V3/inference/model.py [--out FILE]` takes a few seconds on
a CPU. The file is executed; its FP8 kernels are not needed.
"""

import argparse
import json
from pathlib import Path

from eva.benchmarks.deepseek_code import measure_deepseek_code
from eva.fileio.atomic import atomic_write

STORED = Path(__file__).parents[1] / 'eva' / 'results' / 'deepseek_code.json'

if __name__ == '__main__':
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument('path', type=Path, help='inference/model.py of a clone of DeepSeek-V3')
    p.add_argument('--out', type=Path, default=STORED, help='file to write')
    a = p.parse_args()
    found = measure_deepseek_code(a.path)
    with atomic_write(a.out) as tmp:
        tmp.write_text(json.dumps(found, indent=1) + '\n', encoding='utf-8')
    print(f'{a.out}: {len(found["cases"])} configurations')
