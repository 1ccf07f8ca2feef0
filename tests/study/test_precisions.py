"""Caching times precision in one table."""

import importlib.util
import json
import re

import pytest
from commands import error_line, run


@pytest.mark.slow
def test_caching_and_precision_in_one_table(tmp_path):
    few = ["--samples", 4, "--batch-size", 4, "--repeats", 1, "--path", "digits-T10-1.96x"]
    text = run("study.precisions", *few, "--output", tmp_path / "x.json")
    result = json.loads(text.splitlines()[-1])
    assert result == json.loads((tmp_path / "x.json").read_text())
    rows = {(row["weights"], row["method"]): row for row in result["rows"]}
    plain, cached = rows["fp32", "none"], rows["fp32", "digits-T10-1.96x"]
    assert plain["psnr"] is None
    assert plain["mse"] == 0
    assert all(30 < row["psnr"] < 60 for row in rows.values() if row is not plain)
    assert rows["bf16", "none"]["weights_mb"] == pytest.approx(plain["weights_mb"] / 2)
    assert cached["speedup_macs"] == pytest.approx(1.96, rel=0.01)
    missing = error_line("study.precisions", "--path", "nowhere.safetensors")
    assert "nowhere.safetensors does not exist" in missing
    assert "is no multiple" in run("study.precisions", *few, "--samples", 6, status=2)


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("torchao"), reason="needs torchao")
def test_eight_bits_take_a_quarter_of_the_branches():
    few = ["--samples", 10, "--batch-size", 10, "--repeats", 1, "--path", "digits-T10-1.96x"]
    text = run("study.precisions", *few, "--weights", "int8wo")  # torch warns at its end
    rows = json.loads(re.findall("^{.*}$", text, re.MULTILINE)[-1])["rows"]
    assert [row["weights"] for row in rows] == ["fp32"] * 2 + ["int8wo"] * 2
    assert rows[2]["weights_mb"] < 0.6 * rows[0]["weights_mb"]
    assert 30 < rows[3]["psnr"] < rows[2]["psnr"]
