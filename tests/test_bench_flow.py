"""The bench of flow methods at tiny size on the CPU: everything is measured, and its slow ways reach the latents of the fast one."""

import json

import bench_flow as bench


def test_completions_agree_and_every_price_is_measured(tmp_path, capsys):
    file = tmp_path / "figures.json"
    words = ["--size", "tiny", "--device", "cpu", "--steps", "4", "--samples", "3", "--rounds", "1", "--json", str(file)]
    assert bench.main(words) == 0
    found = json.loads(file.read_text())
    assert list(found["completions"]) == ["one by one", "step by step", "wavefront"] and found["pictures"] == 3
    assert all(far < 1e-5 for far in found["difference"].values())
    assert list(found["steps"]) == ["terminal", "n = 1", "n = 2", "n = t"] and all(part["seconds"] > 0 for part in found["steps"].values())
    shown = capsys.readouterr().out
    assert "SD3 tiny, 3 pictures of 4 steps, CPU" in shown and "| wavefront |" in shown and "| n = t |" in shown
