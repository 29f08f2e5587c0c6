"Everything that can be set stands in settings.ini; this file only hands it to setuptools"

import re
import shlex
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
parser = ConfigParser(delimiters=['='])
parser.read(here / 'settings.ini', encoding='utf-8')
cfg = parser['DEFAULT']
package = cfg['lib_path']
repository = cfg['git_url']


def requirements(extra: str = '') -> list[str]:
    "What the package needs, or one of its extras"
    return shlex.split(cfg[f'{extra}_requirements' if extra else 'requirements'])


def absolute(target: str, image: bool) -> str:
    "The address of a file of the repository, for a page that stands elsewhere"
    if re.match(r'[a-z]+:|#', target):
        return target
    kind = 'raw' if image else 'blob'
    return f'{repository}/{kind}/{cfg["branch"]}/{target}'


def long_description() -> str:
    "The README with absolute links: the package index shows it without the repository around it"
    readme = (here / 'README.md').read_text(encoding='utf-8')
    return re.sub(
        r'(!?)(\[[^]]*\])\(([^)\s]+)\)',
        lambda link: f'{link[1]}{link[2]}({absolute(link[3], image=bool(link[1]))})',
        readme,
    )


setup(
    name=cfg['lib_name'],
    version=cfg['version'],
    description=cfg['description'],
    long_description=long_description(),
    long_description_content_type='text/markdown',
    keywords=cfg['keywords'],
    author=cfg['author'],
    author_email=cfg['author_email'],
    url=repository,
    project_urls={
        'Documentation': cfg['doc_host'] + cfg['doc_baseurl'],
        'Source': repository,
        'Issues': f'{repository}/issues',
    },
    license='Apache-2.0',
    license_files=['LICENSE'],
    classifiers=[
        'Development Status :: 3 - Alpha',
        'Intended Audience :: Developers',
        'Intended Audience :: Education',
        'Operating System :: POSIX :: Linux',
        'Operating System :: MacOS',
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
        'Typing :: Typed',
        *(f'Programming Language :: Python :: {v}' for v in ('3.11', '3.12', '3.13')),
    ],
    packages=find_packages(include=[package, f'{package}.*']),
    package_data={package: ['py.typed', 'results/*.json', 'web/*']},
    python_requires=f'>={cfg["min_python"]}',
    install_requires=requirements(),
    extras_require={
        extra: requirements(extra)
        for extra in ('course', 'serve', 'gguf', 'data', 'te', 'docs', 'dev')
    },
    zip_safe=False,
    entry_points={
        'console_scripts': cfg['console_scripts'].split(),
        'nbdev': [f'{package}={package}._modidx:d'],  # lets symbols in the chapters become links
    },
)
