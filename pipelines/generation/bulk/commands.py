"""The official commands that score a folder of a benchmark's layout, as a script that lies beside it."""

import shlex

from lumos.compression import parse_size

VBENCH_DIMENSIONS = (
    "subject_consistency background_consistency motion_smoothness dynamic_degree aesthetic_quality imaging_quality "
    "object_class multiple_objects human_action color spatial_relationship scene temporal_style appearance_style "
    "overall_consistency"
)
I2V_DIMENSIONS = (
    "i2v_subject i2v_background camera_motion subject_consistency background_consistency motion_smoothness "
    "dynamic_degree aesthetic_quality imaging_quality"
)
VBENCH2_DIMENSIONS = (
    "Human_Anatomy Human_Identity Human_Clothes Diversity Composition Dynamic_Spatial_Relationship Dynamic_Attribute "
    "Motion_Order_Understanding Human_Interaction Complex_Landscape Complex_Plot Camera_Motion Motion_Rationality "
    "Instance_Preservation Mechanics Thermotics Material Multi-View_Consistency"
)
_HEAD = """#!/usr/bin/env bash
# Scores this folder by the benchmark's own code, which needs a GPU and downloads its networks.
set -euo pipefail
out=$(cd "$(dirname "$0")" && pwd)
"""
_VBENCH = """# pip install vbench, and a checkout of https://github.com/Vchitect/VBench for the totals:
: "${VBENCH:?set it to the folder of that checkout}"
"""


def evaluation_script(layout: str, prompts: str, size: str) -> str:
    """The script, for the prompts of a file and videos of a size."""
    return _HEAD + {"vbench": _vbench, "vbench-i2v": _i2v, "vbench2": _vbench2, "geneval": _geneval}[layout](
        prompts, size
    )


def _vbench(prompts: str, _size: str) -> str:
    info = shlex.quote(prompts)
    return f"""{_VBENCH}info={info}
# Of the 25 videos per prompt of temporal_flickering, five that are static (by RAFT) are chosen.
vbench static_filter --videos_path "$out/flickering" --result_path "$out/static"
vbench evaluate --full_json_dir "$info" --videos_path "$out/static/filtered_videos" --dimension temporal_flickering \\
    --output_path "$out/results"
for dimension in {VBENCH_DIMENSIONS}; do
    vbench evaluate --full_json_dir "$info" --videos_path "$out/videos" --dimension "$dimension" \\
        --output_path "$out/results"
done
{_totals("cal_final_score.py")}"""


def _i2v(prompts: str, size: str) -> str:
    width, height = parse_size(size)
    ratios = {"1-1": 1, "8-5": 8 / 5, "7-4": 7 / 4, "16-9": 16 / 9}
    ratio = min(ratios, key=lambda name: abs(ratios[name] - width / height))
    return f"""{_VBENCH}info={shlex.quote(prompts)}
cd "$VBENCH"
for dimension in {I2V_DIMENSIONS}; do
    python evaluate_i2v.py --full_json_dir "$info" --videos_path "$out/videos" --dimension "$dimension" \\
        --ratio {ratio} --output_path "$out/results"
done
{_totals("cal_i2v_final_score.py")}"""


def _vbench2(prompts: str, _size: str) -> str:
    return f"""# A checkout of https://github.com/Vchitect/VBench with VBench-2.0 set up:
: "${{VBENCH:?set it to the folder of that checkout}}"
info={shlex.quote(prompts)}
cd "$VBENCH/VBench-2.0"
for dimension in {VBENCH2_DIMENSIONS}; do
    python evaluate.py --full_json_dir "$info" --videos_path "$out/videos" --dimension "$dimension" \\
        --output_path "$out/results/$dimension"
done
"""


def _geneval(_prompts: str, _size: str) -> str:
    return """# A checkout of https://github.com/djghosh13/geneval in its own environment (mmdet 2.x), and its detector:
: "${GENEVAL:?set it to the folder of that checkout}"
: "${DETECTOR:?set it to the folder that evaluation/download_models.sh filled}"
python "$GENEVAL/evaluation/evaluate_images.py" "$out/images" --outfile "$out/results.jsonl" --model-path "$DETECTOR"
python "$GENEVAL/evaluation/summary_scores.py" "$out/results.jsonl"
"""


def _totals(script: str) -> str:
    return f"""(cd "$out/results" && python -m zipfile -c "$out/results.zip" ./*_eval_results.json)
cd "$VBENCH/scripts"
python {script} --zip_file "$out/results.zip" --model_name "$out/scores"
"""
