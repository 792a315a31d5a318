"""Methods that train encoders, beside a modality that no encoder reads and rows that have it alone."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from diptych.finetune.adapt.class_contrast import ClassTexts
from diptych.finetune.predictor import Predictor
from diptych.pretrain.model import load_model

from .labelled import everywhere, squares
from .modal import modal_rows, write_modal, write_modal_task
from .runs import finetune

PROMPTS = "{'0': cheap, '1': [dear, a dear thing]}"
METHODS = {
    "flyp": f"method: contrastive, class_prompts: {PROMPTS}, soup: greedy",
    "wise": f"method: contrastive, class_prompts: {PROMPTS}, wise_ft: auto",
    "soup": "method: lora, soup: uniform",
}


def test_a_row_without_picture_and_text_is_as_near_to_every_class(tmp_path: Path) -> None:
    model = load_model(squares.make_checkpoint(tmp_path / "checkpoint"))
    texts = ClassTexts(model, {"x": ["a"], "y": ["b"], "z": ["c"]}, ("image", "text", "price"), 3)
    random = torch.Generator().manual_seed(0)
    features = {k: torch.randn(2, 24, generator=random) for k in ("image", "text")}
    present = everywhere(2) | {"price": torch.ones(2, dtype=torch.bool)}
    for k in ("image", "text"):
        present[k][1] = False
    with torch.no_grad():
        logits = texts.eval()(features, present)
    assert logits[0].std() > 0
    assert logits[1].tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    "name", ["flyp", *(pytest.param(k, marks=pytest.mark.slow) for k in ("wise", "soup"))]
)
def test_encoders_are_trained_beside_columns(tmp_path: Path, name: str) -> None:
    """Also with inner and training rows that have columns alone, which no text of a class can be near to."""
    heads = f"{{tuned: {{op: gated, width: 8, adapt: {{{METHODS[name]}, encoder_epochs: 1}}}}}}"
    write_modal_task(tmp_path, heads)
    rows: list[dict[str, Any]] = modal_rows(tmp_path)
    for row in (*rows[:2], rows[6]):
        row |= {"image": None, "text": None}
    write_modal(tmp_path, rows)
    results = finetune(tmp_path, "eval.seeds=[0, 1]")
    head = json.loads((tmp_path / "run" / "heads" / "tuned" / "head.json").read_text())
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    numbers = [v for line in lines if line["kind"] == "tuned" for v in line.values() if isinstance(v, float)]
    assert np.isfinite(numbers).all()
    if name != "soup":
        assert any(line.get("phase") == "contrastive" for line in lines)
    if name != "wise":
        assert len(head["seeds"]) == 1
        assert set(head["seeds"][0]["soup"]) <= {0, 1}
    assert results["heads"]["tuned"]["metrics"]["auroc"]["value"] is not None
    model = Predictor.load(tmp_path / "run", head="tuned")
    kept = pq.read_table(tmp_path / "run" / "predictions.parquet").to_pydict()
    of_id = {row["id"]: row for row in rows}
    table = [
        {k: str(tmp_path / v) if k == "image" and v else v for k, v in of_id[i].items()} for i in kept["id"]
    ]
    p = model.predict_proba(table, root=tmp_path)
    np.testing.assert_allclose(p[:, 1], kept["tuned:1"], atol=1e-6)
    for lost in ("image", "text", "sound"):
        alone = [{k: v for k, v in row.items() if k != lost} for row in table]
        assert np.isfinite(model.predict_proba(alone, root=tmp_path)).all()
