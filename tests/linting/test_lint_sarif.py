"""SARIF 2.1.0: what its schema requires of a document, a run, a result and a location, written out here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import rankwise
from rankwise.linting.sarif import to_sarif


def check(document: dict[str, Any]) -> None:
    """The required properties of the schema, and the bounds that code hosts enforce."""
    assert document["version"] == "2.1.0"
    assert document["$schema"].endswith("sarif-2.1.0.json")
    assert isinstance(document["runs"], list)
    for run in document["runs"]:
        driver = run["tool"]["driver"]
        assert driver["name"]
        rules = driver["rules"]
        ids = [rule["id"] for rule in rules]
        assert len(ids) == len(set(ids))
        for rule in rules:
            assert rule["shortDescription"]["text"]
            assert rule["helpUri"].startswith("https://")
            assert rule["defaultConfiguration"]["level"] in {"none", "note", "warning", "error"}
        for invocation in run["invocations"]:
            assert isinstance(invocation["executionSuccessful"], bool)
        for result in run["results"]:
            assert result["message"]["text"]
            assert result["level"] in {"none", "note", "warning", "error"}
            assert ids[result["ruleIndex"]] == result["ruleId"]
            for location in result.get("locations", []):
                physical = location.get("physicalLocation")
                if physical is not None:
                    assert physical["artifactLocation"]["uri"]
                    assert physical.get("region", {"startLine": 1})["startLine"] >= 1
                for logical in location.get("logicalLocations", []):
                    assert logical["fullyQualifiedName"]


def test_document_is_valid_and_says_what_the_record_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = "base_model: m\nadapter: lora\nlora_r: 64\nlora_alpha: 22.6\npeft_use_rslora: true\n"
    Path("my config.yml").write_text(text, encoding="utf-8")
    command = "trl sft --use_peft --lora_r 256 --lora_alpha 16"
    record = rankwise.lint(["my config.yml", command], runtime="vllm,sglang")
    document = json.loads(to_sarif(record))
    check(document)
    results = document["runs"][0]["results"]
    assert [r["ruleId"] for r in results] == [f.code for f in record.findings]
    by_code = {r["ruleId"]: r for r in results}
    place = by_code["integer-alpha"]["locations"][0]["physicalLocation"]
    assert place == {"artifactLocation": {"uri": "my%20config.yml"}, "region": {"startLine": 4}}
    assert "locations" not in by_code["trl-r256-alpha16"]  # a command line lies in no file
    assert by_code["runtime-scale"]["properties"]["runtime"] == "sglang"


def test_an_adapter_is_placed_at_its_config(samples: Path) -> None:
    document = json.loads(to_sarif(rankwise.lint(samples / "adapters" / "deltacompression-poc")))
    check(document)
    (result,) = document["runs"][0]["results"]
    physical = result["locations"][0]["physicalLocation"]
    assert physical["artifactLocation"]["uri"].endswith("deltacompression-poc/adapter_config.json")
    assert physical["artifactLocation"]["uri"].startswith("file:///")
    assert result["level"] == "note"


def test_nothing_found_is_a_run_without_results(tmp_path: Path) -> None:
    path = tmp_path / "adapter_config.json"
    path.write_text('{"peft_type": "LORA", "r": 8, "lora_alpha": 8}')
    document = json.loads(to_sarif(rankwise.lint(path)))
    check(document)
    assert document["runs"][0]["results"] == []
