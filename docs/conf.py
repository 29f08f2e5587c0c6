"Sphinx's settings; tools/docs_site.py copies them and hands over the project's own"

import json
import os

cfg = json.loads(os.environ['EVA_SETTINGS'])

project, author, release, copyright = cfg['title'], cfg['author'], cfg['version'], cfg['copyright']
extensions = ['myst_parser', 'sphinx_copybutton', 'sphinx.ext.mathjax']
exclude_patterns = ['.doctrees']
html_theme, html_favicon = 'furo', 'favicon.svg'
html_title = f'{cfg["title"]} {cfg["version"]}'
html_baseurl = f'{cfg["doc_host"]}{cfg["doc_baseurl"]}/'
html_static_path, html_css_files = ['site.css', 'mathjax'], ['site.css']
html_copy_source = html_show_sourcelink = html_show_sphinx = False
html_theme_options = dict(
    top_of_page_buttons=[],
    footer_icons=[dict(name='Source', url=cfg['git_url'], html='source', **{'class': ''})],
)
pygments_style, pygments_dark_style = 'default', 'github-dark'

myst_enable_extensions = ['dollarmath', 'amsmath', 'colon_fence']
myst_heading_anchors = 4
myst_links_external_new_tab = True
mathjax_path = 'tex-chtml.js'
mathjax3_config = {'options': {'enableMenu': False}}  # the menu would fetch parts that are not here
copybutton_selector = 'div:not(.output) > div.highlight > pre'

add_module_names = False
python_maximum_signature_line_length = 60
toc_object_entries_show_parents = 'hide'
nitpicky = True  # a link to a symbol that does not exist is an error
nitpick_ignore_regex = [('py:class', r'.*')]  # types of other packages in signatures are no links
suppress_warnings = ['myst.header']
