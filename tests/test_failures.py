"""failures.json: written, replaced and removed where it is ours, and never a file of the user's."""

import json

import pytest

from utils.failures import check_report, report_failures

FAILURES = [("a.png", ValueError("a.png: cut"))]


def test_a_report_is_written_replaced_and_removed(tmp_path, capsys):
    assert report_failures(FAILURES, tmp_path) == 1
    assert capsys.readouterr().err == "failed: a.png: cut\n"
    file = tmp_path / "failures.json"
    assert json.loads(file.read_text()) == [{"input": "a.png", "reason": "a.png: cut"}]
    check_report(tmp_path)
    assert report_failures([*FAILURES, ("b.png", OSError("gone"))], tmp_path) == 1 and "gone" in file.read_text()
    assert report_failures([], tmp_path) == 0 and not file.exists()


@pytest.mark.parametrize("text", ["my notes", "[]", "{}", '[{"input": "a"}]', '["a"]'])
def test_a_file_of_the_users_stays_and_is_named_before_and_after_the_work(tmp_path, capsys, text):
    file = tmp_path / "failures.json"
    file.write_text(text)
    with pytest.raises(ValueError, match="failures.json would be written over, and was not made here"):
        check_report(tmp_path)
    with pytest.raises(ValueError, match="failures.json would be written over"):
        report_failures(FAILURES, tmp_path)
    assert "failed: a.png: cut" in capsys.readouterr().err  # what failed is told all the same
    assert report_failures([], tmp_path) == 0 and file.read_text() == text
