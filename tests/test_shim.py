"""The torchvision shim: a broken torchvision does not break transformers; a sound one is left alone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mmalign.shim import nms

BROKEN = """
import torch
@torch.library.register_fake("torchvision::nms")
def meta_nms(dets, scores, iou_threshold): ...
from torchvision import transforms
"""
MODES = """
class InterpolationMode:
    NEAREST = NEAREST_EXACT = BILINEAR = BICUBIC = BOX = HAMMING = LANCZOS = 0
"""
METADATA = "Metadata-Version: 2.1\nName: torchvision\nVersion: 0.28.0\n"


@pytest.fixture
def broken_torchvision(tmp_path: Path) -> Path:
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text(BROKEN)
    (package / "_C.so").write_bytes(b"built for another torch")
    (package / "transforms").mkdir()
    (package / "transforms" / "__init__.py").write_text(MODES)
    (package / "transforms" / "functional.py").write_text("def pil_to_tensor(picture): ...\n")
    (package / "io.py").write_text("")
    (tmp_path / "torchvision-0.28.0.dist-info").mkdir()
    (tmp_path / "torchvision-0.28.0.dist-info" / "METADATA").write_text(METADATA)
    return tmp_path


def python(code: str, path: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": f"{path}{os.pathsep}{Path(__file__).parent.parent}"}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)


def test_broken_torchvision_does_not_break_the_import(broken_torchvision: Path) -> None:
    bare = python("import torchvision", broken_torchvision)
    assert "torchvision::nms does not exist" in bare.stderr, "the fixture must reproduce the fault"
    mended = python("import mmalign, transformers, torchvision; from transformers import CLIPModel", broken_torchvision)
    assert mended.returncode == 0, mended.stderr


def test_importing_the_package_imports_nothing_heavy(tmp_path: Path) -> None:
    done = python("import mmalign, sys; print([name for name in ('torch', 'numpy', 'yaml', 'rich') if name in sys.modules])", tmp_path)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_nms_keeps_the_best_of_overlapping_boxes() -> None:
    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [1.0, 1.0, 11.0, 11.0], [20.0, 20.0, 30.0, 30.0]])  # the first two: IoU 81/119
    scores = torch.tensor([0.8, 0.9, 0.7])
    assert nms(boxes, scores, 0.5).tolist() == [1, 2]
    assert nms(boxes, scores, 0.69).tolist() == [1, 0, 2]
    assert nms(boxes[:0], scores[:0], 0.5).tolist() == []
