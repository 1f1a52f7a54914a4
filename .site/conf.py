"""How Sphinx makes the site, with myst-nb, furo, and MathJax beside the pages"""

from importlib.util import find_spec
from pathlib import Path

project = 'ddpo_tutorial'
author = 'ddpo_tutorial contributors'
copyright = f'2026 {author}'
extensions = ['myst_nb', 'sphinx_copybutton']
html_theme = 'furo'
html_title = project
html_copy_source = False

# outputs are stored in the notebooks
nb_execution_mode = 'off'
nb_merge_streams = True
nb_code_prompt_show = 'Show the code'
nb_code_prompt_hide = 'Hide the code'
myst_enable_extensions = ['dollarmath', 'amsmath']
myst_heading_anchors = 4

# formulas are typeset without a network: the package's name has hyphens, so it cannot be imported
mathjax = Path(find_spec('sphinx-mathjax-offline').submodule_search_locations[0])
html_static_path = [str(mathjax / 'static')]
mathjax_path = 'mathjax/tex-chtml.js'
