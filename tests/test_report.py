"""The HTML page: what it shows, that a stranger's names and prompts stay text, and how it behaves in a browser."""

import base64
import csv
import hashlib
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

import test_deg_lora_flux_kontext as script
from bench import restoration, start_noise
from bench.charts import draw_sampling
from my_dataset.scored_pairs import crop_boxes
from tests.conftest import photograph
from utils import report

HOSTILE = [
    "<script>document.title='taken'</script>",
    '"><img src=x onerror="document.title=1">.png',
    "'-alert(1)-' onmouseover='alert(1)'.png",
    "</pre></table><iframe src=//evil.example></iframe>",
    "{{ 7 * 7 }} {% raw %} &lt;b&gt; javascript:alert(1)",
    "a\u202egnp.exe",
]


class Reader(HTMLParser):
    """Tags with their attributes, and the text of everything but style and script."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.open, self.texts, self.code = [], [], [], {"style": "", "script": ""}
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.open.append(tag)

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data):
        if self.open and self.open[-1] in self.code:
            self.code[self.open[-1]] += data
        elif data.strip():
            self.texts.append(data.strip())

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def pixels(uri):
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))


def scores_of(values):
    """[score] of {(image, crop): {row: psnr}}, with an SSIM of a hundredth of it."""
    return [{"image": image, "crop": crop, "row": row, "psnr": psnr, "ssim": psnr / 100}
            for (image, crop), rows in values.items() for row, psnr in rows.items()]


def means(**rows):
    return {row: {"label": f"the {row}", "psnr": {"mean": mean, "lo": mean - 1, "hi": mean + 1}, "seconds": 0.5}
            for row, mean in rows.items()}


VALUES = {("a.png", 0): {"input": 20.0, "lora": 25.0}, ("a.png", 1): {"input": 21.0, "lora": 30.0},
          ("b.png", 0): {"input": 22.0, "lora": 9.5}}


def write(path, names=("a.png", "b.png"), text="plain"):
    """A page with every part; `names` and `text` stand wherever a stranger's can."""
    values = dict(zip([(name, 0) for name in names], [VALUES["a.png", 0], VALUES["b.png", 0]], strict=True))
    black, white = (Image.new("RGB", (40, 30), colour) for colour in ("black", "white"))
    rows = means(input=21.0, lora=17.25)
    rows["lora"]["label"] = text
    section = report.section(
        text, rows, {"input": means(input=-3.75)["input"] | {"label": text}}, "lora", scores_of(values),
        {name: [report.picture("input", black, text), report.picture("lora", white), report.picture(text, black)]
         for name in names}, {name: [{"type": text, "level": 0.1}] for name in names}, text,
        [report.chart(Figure(figsize=(2, 1)))])
    report.write_report(path, text, text, [section], {"Options": {"prompt": text, text: {"deep": [text]}}})
    return path.read_text(encoding="utf-8")


@pytest.mark.parametrize("hostile", HOSTILE)
def test_names_and_prompts_stay_text_wherever_they_stand(tmp_path, hostile):
    plain = Reader(write(tmp_path / "plain.html"))
    page = Reader(write(tmp_path / "page.html", (hostile, f"2 {hostile}"), hostile))
    assert [tag for tag, _ in page.tags] == [tag for tag, _ in plain.tags]
    assert [attributes.keys() for _, attributes in page.tags] == [attributes.keys() for _, attributes in plain.tags]
    assert page.code == plain.code
    assert page.texts.count(hostile) >= 8 and f"2 {hostile}" in page.texts
    for attributes in page.all("h3") + page.all("td"):
        assert not attributes.keys() - {"class", "data-metric"}


def test_the_page_needs_nothing_but_itself_and_its_policy_lets_nothing_else_in(tmp_path):
    text = write(tmp_path / "page.html")
    page = Reader(text)
    assert not page.all("link") and not page.all("a") and page.all("script") == [{}]
    assert page.all("img") and all(image["src"].startswith("data:image/") for image in page.all("img"))
    assert not re.search(r"url\(|@import|https?://(?!www\.w3\.org)", page.code["style"] + page.code["script"])
    [policy] = [tag["content"] for tag in page.all("meta") if tag.get("http-equiv") == "Content-Security-Policy"]
    digest = base64.b64encode(hashlib.sha256(page.code["script"].encode()).digest()).decode()
    assert policy.split("; ") == ["default-src 'none'", "img-src data:", "style-src 'unsafe-inline'",
                                  f"script-src 'sha256-{digest}'"]


def test_small_pictures_keep_their_pixels_and_large_ones_are_reduced():
    small = Image.fromarray(photograph(size=(60, 100)))
    shown = report.picture("input", small, "20 dB")
    assert (np.asarray(pixels(shown["uri"])) == np.asarray(small)).all()
    assert (shown["width"], shown["enlarged"], shown["caption"]) == (300, True, "20 dB")
    middle, large = (Image.fromarray(photograph(size=size)) for size in ((400, 300), (600, 900)))
    shown = report.picture("input", middle)
    difference = np.asarray(pixels(shown["uri"]), float) - np.asarray(middle)
    assert shown["uri"].startswith("data:image/jpeg") and np.square(difference).mean() < 10
    assert (shown["width"], shown["enlarged"]) == (300, False)
    shown = report.picture("input", large)
    assert pixels(shown["uri"]).size == (768, 512) and shown["width"] == 768 and large.size == (900, 600)
    assert report.picture("input", Image.new("RGB", (1, 1)))["width"] == 384


def test_an_image_is_a_line_with_every_rows_metric_and_what_the_best_gains():
    columns, lines = report.items_table(scores_of(VALUES), means(input=0.0, lora=0.0), "lora")
    assert columns == [("psnr", "lora \N{MINUS SIGN} input"), ("ssim", "lora \N{MINUS SIGN} input"), ("psnr", "input"),
                       ("psnr", "lora"), ("ssim", "input"), ("ssim", "lora")]
    assert lines["a.png"] == ["+5.00", "+0.0500", "20.00", "25.00", "0.2000", "0.2500"]
    assert lines["b.png"][0] == "-12.50" and list(lines) == ["a.png", "a.png, crop 1", "b.png"]
    columns, lines = report.items_table(scores_of(VALUES), means(input=0.0, lora=0.0), None)
    assert len(columns) == 4 and lines["a.png, crop 1"] == ["21.00", "30.00", "0.2100", "0.3000"]


def test_means_have_intervals_and_gains_signs():
    assert report.means_table(means(lora=25.0)) == [
        ["", "psnr", "seconds"], ["the lora", "25.00 [24.00,\N{NO-BREAK SPACE}26.00]", "0.500"]]
    assert report.means_table(means(lora=25.0), "+")[1][1] == "+25.00 [+24.00,\N{NO-BREAK SPACE}+26.00]"


def test_parameters_are_shown_in_short_and_in_full(tmp_path):
    assert report.in_words([{"type": "noise", "level": 0.1}, {"type": "jpeg", "quality": 59}]) == (
        "noise, jpeg", '{"type": "noise", "level": 0.1}\n{"type": "jpeg", "quality": 59}')
    assert report.in_words({"seed": 3}) == ("parameters", '{"seed": 3}')
    picture, scores = report.picture("input", Image.new("RGB", (4, 4))), scores_of(VALUES)
    some = report.section("s", means(input=0.0, lora=0.0), scores=scores, pictures={"a.png": [picture]},
                          notes={"a.png": None, "b.png": {"seed": 3}})
    report.write_report(tmp_path / "page.html", "t", "a", [some], {})
    texts = Reader((tmp_path / "page.html").read_text(encoding="utf-8")).texts
    assert texts.count("parameters") == 1 and "null" not in texts
    texts = Reader(write(tmp_path / "page.html", text="fade")).texts
    assert texts.count('{"type": "fade", "level": 0.1}') == 4  # with picture and in the table, of two images


def test_a_page_may_have_no_scores_and_a_name_that_is_no_unicode(tmp_path):
    picture = report.picture("input", Image.new("RGB", (4, 4)))
    report.write_report(tmp_path / "page.html", "t", "a", [report.section("s", pictures={"\udcff.png": [picture]})], {})
    page = Reader((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert "\\udcff.png" in page.texts and not page.all("table") and len(page.all("img")) == 1


# ---- the scripts' pages ----


@pytest.fixture
def restoring(tiny_model, tiny_lora, tmp_path, models_load_once):
    """restoring(*flags) runs the test script and returns its page."""

    def call(*flags):
        argv = ["--pretrained_model_name_or_path", tiny_model, "--lora", tiny_lora, "--num_inference_steps", "2",
                "--output", str(tmp_path / "out"), *map(str, flags)]
        script.main(script.parse_args(argv))
        return Reader((tmp_path / "out" / "report.html").read_text(encoding="utf-8"))

    return call


def test_scoring_writes_a_page_of_its_scores_and_pictures(restoring, photos, tmp_path):
    prompt = HOSTILE[0]
    page = restoring("--clean", photos / "heldout", "--degradation_types", "noise", "--noise_level", "0.1", "--prompt",
                     prompt, "--crop_px", 16, "--crops_per_image", 2, "--metrics", "psnr", "--grid_images", 1,
                     "--no-nlm_row", "--no-bilateral_row")
    with open(tmp_path / "out" / "scores.csv", encoding="utf-8") as file:
        scores = list(csv.DictReader(file))
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())
    for score in scores:
        assert f"{float(score['psnr']):.2f}" in page.texts
        assert score["image"] + f", crop {score['crop']}" * (score["crop"] != "0") in page.texts
    gains = [values["psnr"] for values in found["lora_minus"].values()]
    assert all(f"{gain['mean']:+.2f} [{gain['lo']:+.2f},\N{NO-BREAK SPACE}{gain['hi']:+.2f}]" in page.texts
               for gain in gains)
    shown = [image["alt"] for image in page.all("img")]
    assert shown == ["input", "LoRA", "base", "VAE ceiling", "target"]  # of the middle crop of one image
    target = np.asarray(pixels(page.all("img")[4]["src"]))
    top, left, bottom, right = crop_boxes(48, 64, 16, 2)[1]
    assert (target == np.asarray(Image.open(scores[0]["image"]).convert("RGB"))[top:bottom, left:right]).all()
    assert json.dumps(found["degradations"][1]["degradation"][0]) in page.texts
    assert prompt in page.texts and found["versions"]["torch"] in page.texts
    assert found["definitions"]["psnr"] in page.texts and str(found["run"]["lora"]["sha256"]) in str(page.texts)


def test_scoring_the_base_model_alone_has_no_gains(restoring, photos):
    page = restoring("--clean", photos / "heldout", "--degradation_types", "noise", "--metrics", "psnr", "--lora", "",
                     "--max_images", 1, "--no-nlm_row", "--no-bilateral_row", "--grid_images", 0)
    assert not page.all("img") and not any("minus" in text for text in page.texts)
    assert [head.get("data-metric") for head in page.all("th") if "data-metric" in head] == ["psnr"] * 4


def test_stored_pairs_have_no_parameters_to_show(restoring, photos):
    page = restoring("--clean", photos / "heldout", "--degraded", photos / "heldout", "--metrics", "psnr",
                     "--no-base_row", "--no-nlm_row", "--no-bilateral_row", "--max_images", 1)
    assert "degradation" not in page.texts and "parameters" not in page.texts and page.all("img")


def test_restoring_writes_a_page_of_inputs_and_outputs(restoring, tmp_path):
    for name, size in (("a.png", (32, 48)), ("sub/b.png", (16, 20)), ("sub/c.png", (16, 20))):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(photograph(size=size)).save(tmp_path / "in" / name)
    (tmp_path / "in" / "broken.png").write_text("no image")
    flags = ["--input", tmp_path / "in", "--grid_images", 2]
    page = restoring(*flags)
    assert "2 of 4 images, 1 failed" in page.texts and {"a.png", "sub/b.png"} < set(page.texts)
    assert [image["alt"] for image in page.all("img")] == ["input", "restored"] * 2
    for image, file in zip(page.all("img"), ("in/a.png", "out/a.png", "in/sub/b.png", "out/sub/b.png"), strict=True):
        assert (np.asarray(pixels(image["src"])) == np.asarray(Image.open(tmp_path / file))).all()
    sidecar = json.loads((tmp_path / "out" / "a.png.json").read_text())
    assert any(sidecar["input_sha256"] in text and "tiles_used" in text for text in page.texts)
    again = restoring(*flags)  # nothing is left to restore, and the page is there as before
    assert again.tags == page.tags and again.texts == page.texts


def test_the_benchmark_writes_a_page_with_a_part_and_a_chart_for_every_set(tiny_model, tiny_lora, photos, tmp_path):
    argv = ["--pretrained_model_name_or_path", tiny_model, "--lora", tiny_lora, "--clean", photos / "heldout", "--sets",
            "noise15,x2", "--steps", "1,2", "--base_steps", "2", "--tune_on", photos / "train", "--grid_images", 1,
            "--max_sequence_length", 16, "--output", tmp_path]
    restoration.main(restoration.parse_args(list(map(str, argv))))
    page = Reader((tmp_path / "report.html").read_text(encoding="utf-8"))
    sets = json.loads((tmp_path / "results.json").read_text())["sets"]
    assert {"noise15", "x2"} < set(page.texts)
    charts = [image["src"] for image in page.all("img") if image["alt"].startswith("chart")]
    assert len(charts) == 2 and all(b"<svg" in base64.b64decode(uri.partition(",")[2]) for uri in charts)
    for described in sets.values():
        assert f"{described['best']['lora']}, minus the others" in page.texts
        assert json.dumps(described["degradations"]["photo_6.png"][0]) in page.texts
        mean = described["rows"]["ceiling"]["psnr"]
        assert f"{mean['mean']:.2f} [{mean['lo']:.2f},\N{NO-BREAK SPACE}{mean['hi']:.2f}]" in page.texts
    shown = [image["alt"] for image in page.all("img") if not image["alt"].startswith("chart")]
    assert shown[5:7] == [restoration.LABELS.get(row, row) for row in (
        "input", sets["x2"]["best"]["lora"])] and len(shown) == 10


# ---- charts ----


def test_a_sampling_chart_has_a_line_for_each_model_over_steps_and_seconds():
    lines = {"LoRA": [(4, 0.4, 26.0, 25.5, 26.2), (1, 0.1, 25.0, 24.0, 27.0)], "base": [(28, 3.0, 24.0, 23.0, 25.0)]}
    steps, seconds = draw_sampling(lines, {"input": 20.0}, "PSNR, dB").axes
    container = steps.containers[0]
    np.testing.assert_equal(container.lines[0].get_xydata(), [[1, 25], [4, 26]])
    spans = [segment[:, 1].tolist() for segment in container.lines[2][0].get_segments()]
    np.testing.assert_allclose(spans, [[24, 27], [25.5, 26.2]])
    assert [text.get_text() for text in steps.get_legend().get_texts()] == ["LoRA", "base"]
    assert [tick.get_text() for tick in steps.get_xticklabels()] == ["1", "4", "28"] and steps.get_xscale() == "log"
    np.testing.assert_equal(seconds.lines[0].get_xydata(), [[0.1, 25], [0.4, 26]])
    assert steps.lines[-1].get_ydata()[0] == 20 and steps.texts[0].get_text() == "input"
    untimed = draw_sampling({"0.5": [(1, None, 25.0, 24.0, 26.0)]}, {}, "PSNR, dB")
    assert len(untimed.axes) == 1 and untimed.axes[0].get_ylabel() == "PSNR, dB"


def test_the_start_noise_study_is_drawn_with_the_spread_over_seeds(tmp_path, monkeypatch):
    for seed in (0, 1):
        scores = {str(steps): {"psnr": [25.0 + seed], "laplacian": [1.0]} for steps in start_noise.SAMPLING_STEPS}
        arm = {"equal steps": scores, "equal time": scores, "steps": {"equal steps": 20, "equal time": 9},
               "capped": False}
        (tmp_path / f"seed-{seed}.json").write_text(json.dumps({"1": arm, "0, gradient loss": arm}))
    drawn = []
    monkeypatch.setattr(start_noise, "draw_sampling", lambda *rest: drawn.append(draw_sampling(*rest)) or drawn[-1])
    monkeypatch.setattr("sys.argv", ["start_noise", "--table", "--output", str(tmp_path)])
    start_noise.main()
    assert {path.name for path in tmp_path.glob("*.png")} == {"equal_steps.png", "equal_time.png"}
    axes = drawn[0].axes[0]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["1", "0, gradient loss"]
    spans = [np.ptp(segment[:, 1]) for segment in axes.containers[0].lines[2][0].get_segments()]
    np.testing.assert_allclose(spans, [2 * 0.5**0.5] * len(start_noise.SAMPLING_STEPS))


# ---- in a browser ----


@pytest.fixture
def browse(browser, tmp_path):
    """browse(text, names, **options of the browser) opens the page in Chromium and returns it; what it asks of the
    network or logs as an error fails the test in the end."""
    troubles = []

    def call(text="plain", names=("a.png", "b.png"), **options):
        path = tmp_path / "page.html"
        write(path, names, text)
        page = browser.new_context(**options).new_page()
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("console", lambda message: troubles.append(message.text) if message.type == "error" else None)
        page.on("request", lambda request: troubles.append(request.url)
                if not request.url.startswith((path.as_uri(), "data:")) else None)
        page.goto(path.as_uri())
        return page

    yield call
    assert not troubles


def items(page):
    return page.locator("table.items tbody tr td:first-child").all_inner_texts()


def test_columns_sort_by_number_and_by_name_both_ways(browse):
    page = browse(names=("image 10.png", "image 9.png"))
    gain, image = (page.locator("table.items th button", has_text=text) for text in ("psnr: lora −", "image"))
    gain.click()
    assert items(page) == ["image 9.png", "image 10.png"]  # -12.5 before +5
    gain.click()
    assert items(page) == ["image 10.png", "image 9.png"]
    assert page.locator("th[aria-sort=descending]").count() == 1
    image.click()
    assert items(page) == ["image 9.png", "image 10.png"]


def test_one_metric_is_shown_at_a_time(browse):
    page = browse()
    shown = page.locator("table.items th:visible")
    assert shown.all_inner_texts() == ["image", "psnr: lora − input", "psnr: input", "psnr: lora", "degradation"]
    page.get_by_label("metric").select_option("ssim")
    assert shown.all_inner_texts() == ["image", "ssim: lora − input", "ssim: input", "ssim: lora", "degradation"]


def test_the_slider_moves_the_line_between_two_pictures(browse):
    page = browse()
    stage = page.locator(".compare").first

    def grey_levels():
        """Mean level of the left and of the right quarter of what the stage shows, without rim and captions."""
        shot = np.asarray(Image.open(io.BytesIO(stage.screenshot())).convert("L"), float)[20:200, 5:-5]
        return shot[:, : shot.shape[1] // 4].mean(), shot[:, -shot.shape[1] // 4 :].mean()

    assert grey_levels() == (0, 255)  # input is black, the restored one white
    slider = stage.get_by_role("slider")
    box = slider.bounding_box()
    page.mouse.click(box["x"] + 1, box["y"] + 50)
    left, right = grey_levels()
    assert left > 240 and right == 255  # all white, up to the line
    page.mouse.click(box["x"] + box["width"] - 1, box["y"] + 50)
    left, right = grey_levels()
    assert left == 0 and right < 15
    page.get_by_label("left").first.select_option("lora")
    page.get_by_label("right").first.select_option("plain")  # the third picture, black
    left, right = grey_levels()
    assert left == 255 and right > 240
    slider.focus()
    page.keyboard.press("Home")
    assert max(grey_levels()) < 15


def test_without_javascript_every_picture_and_number_is_there(browse):
    page = browse(java_script_enabled=False)
    assert page.locator("img:visible").count() == 1 + 2 * 3
    assert page.locator("table.items td:visible").count() == 2 * (1 + 6 + 1) and not page.locator("button").count()


@pytest.mark.parametrize("hostile", HOSTILE)
def test_a_browser_runs_no_script_of_a_name_or_prompt(browse, hostile):
    page = browse(hostile, (hostile, f"2 {hostile}"))
    assert page.title().strip() == hostile.strip() and page.locator("iframe").count() == 0
    assert page.locator("img:visible").count() == 1 + 2 * 2  # chart, and two of three pictures of each image
    page.get_by_label("right").first.select_option(index=2)
    assert page.get_by_label("right").first.locator("option").nth(2).inner_text().strip() == hostile.strip()
