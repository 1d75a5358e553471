"""The list of mutants is that of the present sources; `make mutants` runs them."""

from collections import Counter

from tests.mutants import MUTANTS, source


def test_each_mutant_changes_one_place_of_the_sources():
    for mutant in MUTANTS:
        found = source(mutant).read_text("utf-8").count(mutant.old)
        assert found == 1, f"{mutant.name}: {found} places"
        assert mutant.old != mutant.new


def test_there_are_many_and_each_has_its_name():
    assert len(MUTANTS) >= 30
    assert max(Counter(m.name for m in MUTANTS).values()) == 1
