"""Every reader of the table, held to every rule of the contract."""

import pytest

from checkpoints import contract
from checkpoints.making import MAKERS
from rankwise.checkpoints import READERS


@pytest.fixture(params=sorted(MAKERS))
def made(request, tmp_path, rng):
    folder = tmp_path / "source"
    folder.mkdir()
    return MAKERS[request.param](folder, rng)


def test_every_reader_is_held_to_the_contract():
    assert set(MAKERS) == set(READERS)


def test_reads_the_truth(made):
    contract.reads_the_truth(made)


def test_is_lazy(made, monkeypatch):
    contract.is_lazy(made, monkeypatch)


def test_holds_no_file_open(made):
    contract.holds_no_file_open(made)


def test_refuses_what_is_not_there(made):
    contract.refuses_what_is_not_there(made)


def test_refuses_the_other_kind(made):
    contract.refuses_the_other_kind(made)


def test_imports_little(made):
    contract.imports_little(made)


def test_executes_nothing(made, tmp_path, monkeypatch):
    contract.executes_nothing(made, tmp_path, monkeypatch)


def test_refuses_every_truncation(made):
    contract.refuses_every_truncation(made)
