"Everything that can be set stands in settings.ini; this file only hands it to setuptools"
import shlex
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

here = Path(__file__).parent
parser = ConfigParser(delimiters=['='])
parser.read(here/'settings.ini', encoding='utf-8')
cfg = parser['DEFAULT']

def wants(extra=''): return shlex.split(cfg[f'{extra}_requirements' if extra else 'requirements'])

readme = here/'README.md'
setup(
    name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], keywords=cfg['keywords'],
    author=cfg['author'], author_email=cfg['author_email'], url=cfg['git_url'], license='Apache-2.0',
    long_description=readme.read_text(encoding='utf-8') if readme.exists() else cfg['description'],
    long_description_content_type='text/markdown',
    classifiers=['Development Status :: 3 - Alpha', 'Intended Audience :: Developers', 'Intended Audience :: Education',
                 *(f'Programming Language :: Python :: {v}' for v in ('3.11', '3.12', '3.13'))],
    packages=find_packages(include=[cfg['lib_path'], f"{cfg['lib_path']}.*"]), python_requires=f">={cfg['min_python']}",
    install_requires=wants(), extras_require={o: wants(o) for o in ('dev', 'docs', 'data', 'te')}, zip_safe=False,
    entry_points=dict(console_scripts=cfg['console_scripts'].split(),
                      nbdev=[f"{cfg['lib_path']}={cfg['lib_path']}._modidx:d"]), # lets symbols in the chapters become links
)
