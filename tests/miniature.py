"""All eight benchmarks in miniature: a handful of rows each, on one tiny clip.

Layouts and field names are those of their repositories and hub pages. The values are made up.
"""

import json
import shutil
from pathlib import Path

from conftest import make_video

DATA = {  # what --data is
    "mmvu": "mmvu/validation.json", "vsibench": "vsibench/test.jsonl", "videommmu": "videommmu",
    "holmes": "holmes/test_Video-Holmes.json", "longvideobench": "lvb/lvb_val.json",
    "lvbench": "lvbench/video_info.meta.jsonl", "mvbench": "mvbench", "tempcompass": "tempcompass"}


def clip(path, source):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path != source:
        shutil.copy(source, path)


def dump(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".parquet":
        import pyarrow.parquet  # the benchmarks that come as JSON do without
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text(json.dumps(rows))


def make(folder):
    """Write all of them below `folder`, and return it."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    source = make_video(folder / "source.mp4", frames=24, size=(56, 56), fps=8)
    for write in (mmvu, vsibench, videommmu, holmes, longvideobench, lvbench, mvbench, tempcompass):
        write(folder, source)
    return folder


def mmvu(folder, source):
    url = "https://huggingface.co/datasets/yale-nlp/MMVU/resolve/main/"
    five = {"A": "Hooke", "B": "Ohm", "C": "Snell", "D": "Joule", "E": "Lenz"}
    row = {"youtube_url": "", "metadata": {"subject": "Mechanics", "textbook": "", "rationale": ""}}
    dump(folder / DATA["mmvu"], [
        {**row, "id": "validation_0", "video": url + "videos/Mechanics/1.mp4",
         "question_type": "multiple-choice", "question": "Which law?", "choices": five,
         "answer": "E"},
        {**row, "id": "validation_1", "video": url + "videos/Clinical_Medicine/2.mp4",
         "question_type": "multiple-choice", "question": "Which disease?", "choices": five,
         "answer": "B"},
        {**row, "id": "validation_2", "video": url + "videos/Mechanics/1.mp4",
         "question_type": "open-ended", "question": "What force?",
         "choices": dict.fromkeys("ABCDE", ""), "answer": "friction"}])
    clip(folder / "mmvu/videos/Mechanics/1.mp4", source)
    clip(folder / "mmvu/videos/Clinical_Medicine/2.mp4", source)


VSI = [("object_counting", "2", None), ("object_counting", "4", None),
       ("object_abs_distance", "1.0", None), ("object_size_estimation", "8", None),
       ("room_size_estimation", "3", None), ("object_rel_distance", "A", 4),
       ("object_rel_direction_easy", "B", 2), ("object_rel_direction_medium", "C", 3),
       ("object_rel_direction_hard", "D", 4), ("object_rel_direction_hard", "A", 4),
       ("route_planning", "C", 3), ("obj_appearance_order", "D", 4)]


def vsibench(folder, source):
    dump(folder / DATA["vsibench"], [
        {"id": i, "dataset": "scannet", "scene_name": "scene0000_00", "question_type": kind,
         "question": f"Question {i}?", "ground_truth": gold,
         "options": options and [f"{'ABCD'[k]}. way {k}" for k in range(options)]}
        for i, (kind, gold, options) in enumerate(VSI)])
    clip(folder / "vsibench/scannet/scene0000_00.mp4", source)


def videommmu(folder, source):
    many = [f"{k} %" for k in range(14)]
    adaptation = [
        {"id": "validation_Finance_1", "question": "<image 1> Which?", "options": many[:10],
         "answer": "J", "question_type": "multiple-choice"},
        {"id": "test_Math_2", "question": "<Image 1> How many?", "options": [], "answer": "12.5",
         "question_type": "open"},
        {"id": "new_Physics_21", "question": "<image 1> Choose.", "options": [], "answer": "A",
         "question_type": "open"},
        {"id": "dev_Art_Theory_3", "question": "<image 1> Which?", "options": many[:10],
         "answer": "B", "question_type": None},
        {"id": "validation_Manage_4", "question": "How long?", "options": [],
         "answer": "['24/7', '3.429', '3.43]", "question_type": "open"}]
    row = {"id": "validation_Finance_1", "link_selected": "https://www.youtube.com/watch?v=x"}
    dump(folder / "videommmu/Perception/test-00000-of-00001.parquet",
         [{**row, "question": "Which?", "options": many, "answer": "N",
           "question_type": "multiple-choice"}])
    dump(folder / "videommmu/Comprehension/test-00000-of-00001.parquet",
         [{**row, "question": "Which?", "options": ["A. one", "B. two"], "answer": "B",
           "question_type": "multiple-choice"}])
    dump(folder / "videommmu/Adaptation/test-00000-of-00001.parquet", adaptation)
    for name, faculty in (("validation_Finance_1", "Business"), ("test_Math_2", "Science"),
                          ("new_Physics_21", "Science"),
                          ("dev_Art_Theory_3", "Art"), ("validation_Manage_4", "Business")):
        clip(folder / f"videommmu/{faculty}/{name}.mp4", source)
        clip(folder / f"videommmu/question_only/{name}_image.mp4", source)


def holmes(folder, source):
    row = {"Question": "Who did it?", "Options": {x: f"person {x}" for x in "FEDCBA"},
           "Explanation": "..."}
    dump(folder / DATA["holmes"], [
        {**row, "video ID": "vidA", "Question ID": 1, "Question Type": "SR", "Answer": "C"},
        {**row, "video ID": "vidA", "Question ID": 2, "Question Type": "TA", "Answer": "A"},
        {**row, "video ID": "vidB", "Question ID": 1, "Question Type": "SR", "Answer": "F"},
        {**row, "video ID": "vidB", "Question ID": 1, "Question Type": "CTI", "Answer": "B"}])
    clip(folder / "holmes/Benchmark/videos/videos_cropped/vidA.mp4", source)
    clip(folder / "holmes/Benchmark/videos/videos_cropped/vidB.mp4", source)


def longvideobench(folder, source):
    row = {"question_wo_referring_query": "", "position": [3], "topic_category": "KG",
           "level": "L1-Perception", "starting_timestamp_for_subtitles": 10, "view_count": 1,
           "type": "local"}
    dump(folder / DATA["longvideobench"], [
        {**row, "video_id": "a_0", "id": "a_0_1", "question": "What is held?",
         "candidates": ["a pen", "a cup"], "correct_choice": 0, "question_category": "S2A",
         "video_path": "a_0.mp4", "subtitle_path": "a_0_en.json", "duration_group": 15,
         "duration": 3.0},
        {**row, "video_id": "a_0", "id": "a_0_2", "question": "Who speaks?",
         "candidates": ["v", "w", "x", "y", "z"], "correct_choice": 4, "question_category": "T2E",
         "video_path": "a_0.mp4", "subtitle_path": "a_0_en.json", "duration_group": 3600,
         "duration": 3.0}])
    clip(folder / "lvb/videos/a_0.mp4", source)
    dump(folder / "lvb/subtitles/a_0_en.json", [
        {"start": "00:00:10.000", "end": "00:00:10.800", "line": "good morning"},
        {"start": "00:01:00.000", "end": "00:01:02.000", "line": "much later"}])


def lvbench(folder, source):
    text = "What year?\n(A) 1636\n(B) 1366\n(C) 1363\n(D) 1633"
    dump(folder / DATA["lvbench"], [
        {"key": "Cm7", "type": "cartoon", "video_info": {"fps": 25.0}, "qa": [
            {"uid": "55", "question": text, "answer": "D",
             "question_type": ["key information retrieval", "reasoning"],
             "time_reference": "00:00-00:01"},
            {"uid": "56", "question": text, "answer": "A", "question_type": ["reasoning"],
             "time_reference": "00:00:01-00:00:02"}]}])
    clip(folder / "lvbench/videos/00000/Cm7.mp4", source)


def mvbench(folder, source):
    from PIL import Image
    three = ["a ball", "a cup", "a hat"]
    dump(folder / "mvbench/json/action_sequence.json", [
        {"video": "ZS9XR.mp4", "question": "What happened?", "candidates": three, "answer": "a cup",
         "start": 1.0, "end": 2.0}])
    dump(folder / "mvbench/json/moving_count.json", [
        {"video": "video_1.mp4", "question": "How many?", "candidates": ["one"], "answer": "one"}])
    dump(folder / "mvbench/json/object_shuffle.json", [
        {"video": "video_1.mp4", "question": "Where?", "candidates": three, "answer": "a hat"}])
    dump(folder / "mvbench/json/episodic_reasoning.json", [
        {"video": "castle_1", "question": "Why?", "candidates": three + ["x", "y"], "answer": "y",
         "start": 0.0, "end": 2.0, "subtitle": "", "show_name": "Castle", "fps": 3}])
    clip(folder / "mvbench/video/star/Charades_v1_480/ZS9XR.mp4", source)
    clip(folder / "mvbench/video/clevrer/video_validation/video_1.mp4", source)
    clip(folder / "mvbench/video/perception/videos/video_1.mp4", source)
    frames = folder / "mvbench/video/tvqa/frames_fps3_hq/castle_1"
    frames.mkdir(parents=True)
    for i in range(1, 13):
        Image.new("RGB", (56, 56), (10 * i,) * 3).save(frames / f"{i:05d}.jpg", quality=95)


def tempcompass(folder, source):
    mc = {"question": "What happens?\nA. it opens\nB. it closes\nC. it turns",
          "answer": "B. it closes"}
    dump(folder / "tempcompass/questions/multi-choice.json", {"1021": {"action": [mc]}})
    dump(folder / "tempcompass/questions/yes_no.json", {"1021": {"action": [
        {"question": "Does it close?", "answer": "yes"},
        {"question": "Does it open?", "answer": "no"}]}})
    dump(folder / "tempcompass/questions/caption_matching.json", {"1021_reverse": {"direction": [
        {"question": "Which description fits?\nOption 1: It opens.\nOption 2: It closes.",
         "answer": "Option 2: It closes."},
        {"question": "Which caption fits?\nCaption A: It opens.\nCaption B: It closes.",
         "answer": "Caption A: It opens."}]}})
    dump(folder / "tempcompass/questions/captioning.json", {"1021": {"action": [
        {"question": "Pick from the list.\nInformation A: {it opens}\nInformation B: {it closes}\n"
                     "Generated Caption:",
         "answer": "B. it closes"}]}})
    dump(folder / "tempcompass/meta_info.json", {"1021": {}})
    for name in ("1021", "1021_reverse"):
        clip(folder / f"tempcompass/videos/{name}.mp4", source)
