#!/bin/sh
# Text, tokens, the runs at 25M parameters and their four tables, from nothing.
#
#   sh examples/comparison.sh WORK_DIR [OPTIONS of `compare.py run`]
#
# On Debian 12 with pip, the packages of `pip install -e ".[benchmark,train]"`, and a GPU or several. WORK_DIR takes 1 GB. What is there
# already is not made again. The wheels are of the versions named, and Debian's packages had no update since it came out, so that all who
# run this have the same tokens.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$1/debs" "$1/wheels"
cd "$1"
shift

prose="dict-devil dict-foldoc dict-gcide dict-jargon"
docs="aptitude-doc-en cppreference-doc-en-html debian-reference-en gimp-help-en maxima-doc octave-doc python-pandas-doc python-scipy-doc
    python-sklearn-doc python-statsmodels-doc python-sympy-doc racket-doc"
wheels="aiohttp==3.14.5 ansible-core==2.21.5 astropy==8.0.2 bokeh==3.10.2 celery==5.7.0 dask==2026.8.0 distributed==2026.8.0 django==6.1.3
    docutils==0.23 ipython==9.18.1 matplotlib==3.11.2 mypy==2.4.1 networkx==3.7 nltk==3.10.4 numpy==2.5.5 pandas==3.1.1 prefect==3.9.1
    pylint==4.1.4 pyomo==6.10.1 qiskit==2.6.2 scikit-learn==1.9.1 scipy==1.18.1 scrapy==2.19.0 sphinx==9.1.1 sqlalchemy==2.1.9
    statsmodels==0.15.0 sympy==1.14.0 tornado==6.6.1 transformers==5.17.0 twisted==26.10.0"

if [ ! -d tokens ]; then
    (cd debs && apt-get download $prose $docs)
    pip download -q --no-deps --only-binary=:all: --python-version 3.12 --platform any --platform manylinux2014_x86_64 \
        --platform manylinux_2_28_x86_64 -d wheels $wheels
    of() { for package in "$@"; do ls debs/"$package"_*.deb; done; }
    gather() { python "$here/gather.py" "$@" --megabytes 31.5 --overwrite; }
    gather $(of $prose | sed s/^/prose=/) --output-dir texts/prose
    gather $(of $docs) --output-dir texts/docs
    gather wheels/*.whl --output-dir texts/python
    rm -f texts/*/c-* texts/python/docs-* texts/docs/python-*
    python "$here/prepare.py" --text texts --suffix .xz --vocab-size 8192 --tokenizer-megabytes 10 --held-out-fraction 0.008 \
        --output-dir tokens
fi
python "$here/compare.py" run --data tokens --results comparison.json --work-dir models "$@"
python "$here/compare.py" report --results comparison.json --output comparison.md
