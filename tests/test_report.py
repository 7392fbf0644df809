"""The report: what the pages hold, that nothing escapes into markup, and that they work in a real browser from disk."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest
from helpers.browser import Page, Visitor
from helpers.runs import make_prompts, make_run

from mmalign import gallery, results
from mmalign.report import write_report
from mmalign.types import Deviation, Failure, MmalignError, Prompt, Request, Row, Sample, UsageError, Value

HOSTILE = "a cat</script><script>alert(1)</script><img src=x onerror=alert(2)> \"quoted\" 'single' & <!-- \u2028 ../../x"


def gallery_page(index: Path, name: str = "tiny-janus--shapes") -> Path:
    return index.parent / "gallery" / f"{name}.html"


# -- structure ----------------------------------------------------------------------------------------------------------------------


def test_front_page_shows_number_interval_counts_and_how_to_quote_it(tmp_path: Path) -> None:
    directory = make_run(tmp_path, make_prompts(24), images_per_prompt=2)
    index = write_report([directory])
    assert index == directory / "index.html"
    page = Page(index)
    text = " ".join(" ".join(page.text).split())
    (file,) = results.find(directory)
    result = results.read(file)
    metric = result.metrics["overall"]
    assert metric.value is not None and metric.ci is not None
    assert f"{metric.value:.3f}" in text and f"[{metric.ci[0]:.3f}, {metric.ci[1]:.3f}]" in text
    assert "48 of 48" in text and "complete" in text and "official" in text
    assert results.paste_line(result) in text
    assert "mmalign eval --model tiny-janus --suite shapes" in text
    assert "bounds" not in text.lower().split("all metrics")[0]
    assert "Failures" not in text


def test_failures_deviations_bounds_and_training_reward_are_said(tmp_path: Path) -> None:
    holes = ["generate/timeout", "score/parse", "score/parse"]
    deviation = Deviation("judge", "gpt-4o-2024-05-13", "local", "offline")
    directory = make_run(tmp_path, make_prompts(24), failures=holes, deviations=[deviation], rewards=["shapes"])
    page = Page(write_report([directory]))
    text = " ".join(" ".join(page.text).split())
    assert "stage timeout parse all generate 1 1 score 2 2" in text
    assert "official except judge=local (card: gpt-4o-2024-05-13)" in text
    assert "shapes was a training reward" in text and "was a training reward" in text
    assert "The missing measurements could move it" in text
    assert "--retry-failed" in text
    assert any(attributes.get("id") == "failed" for _, attributes in page.elements)


@pytest.mark.parametrize(("status", "is_marked"), [("partial", True), ("complete", False)])
def test_a_limited_run_is_watermarked_on_every_page(tmp_path: Path, status: str, is_marked: bool) -> None:
    index = write_report([make_run(tmp_path, make_prompts(6), status=status)])  # type: ignore[arg-type]
    for path in (index, gallery_page(index)):
        marks = [attributes for attributes in Page(path).named("div") if attributes.get("class") == "watermark"]
        assert bool(marks) == is_marked


def test_two_models_share_a_figure_and_get_a_page_of_pairs(tmp_path: Path) -> None:
    prompts = make_prompts(40)
    first = make_run(tmp_path, prompts, failures=["score/oom"])
    second = make_run(tmp_path, prompts[:30], model="org/better", skill=0.9)
    index = write_report([first, second])
    assert index == tmp_path / "report" / "index.html"
    page = Page(gallery_page(index, "org--better--shapes--against--tiny-janus--shapes"))
    assert len(page.data["items"]) == 30 and page.data["models"] == ["tiny-janus", "org/better"]
    values = [[cell["scores"].get("shapes", {}).get("value") for cell in item["cells"]] for item in page.data["items"]]
    both = [(before, after) for before, after in values if before is not None and after is not None]
    assert len(both) == 29
    wins, losses = sum(after > before for before, after in both), sum(after < before for before, after in both)
    text = " ".join(" ".join(page.text).split())
    assert f"shapes on 29 pairs of one prompt and one seed: org/better better in {wins}, equal in {29 - wins - losses}" in text
    mean = sum(after - before for before, after in both) / 29
    assert f"Mean difference +{mean:.3f}, 95% interval [" in text
    assert Page(index).content.count('<svg class="figure"') == 2  # one dot plot for both, one bar of outcomes


def test_pairs_need_the_same_prompt_and_seed() -> None:
    def item(seed: int, text: str = "a cat") -> gallery.Item:
        return gallery.item_of(Row(Request(Prompt("p", text), 0, seed), Sample(Request(Prompt("p", text), 0, seed))))

    assert len(gallery.pair([item(1)], [item(1)])) == 1
    assert gallery.pair([item(1)], [item(2)]) == []
    assert gallery.pair([item(1)], [item(1, "a dog")]) == []


def test_several_results_of_one_place_and_of_many(tmp_path: Path) -> None:
    make_run(tmp_path, make_prompts(6), suite="one")
    make_run(tmp_path, make_prompts(6), suite="two")
    index = write_report([tmp_path], tmp_path / "elsewhere")
    assert {path.stem for path in (index.parent / "gallery").glob("*.html")} == {"tiny-janus--one", "tiny-janus--two"}


def test_a_directory_shows_its_newest_result_and_a_file_itself(tmp_path: Path) -> None:
    make_run(tmp_path, make_prompts(6))
    directory = make_run(tmp_path, make_prompts(12))
    old, new = sorted(results.find(directory), key=lambda path: results.read(path).counts.expected)
    for path, ended in ((old, "2026-01-01T00:00:00+00:00"), (new, "2026-01-02T00:00:00+00:00")):
        content = json.loads(path.read_text())
        content["provenance"]["ended"] = ended
        path.write_text(json.dumps(content))
    assert "12 of 12" in write_report([directory], tmp_path / "a").read_text()
    assert "6 of 6" in write_report([old], tmp_path / "b").read_text()


# -- escaping and isolation -------------------------------------------------------------------------------------------------------------


def test_hostile_text_never_becomes_markup(tmp_path: Path) -> None:
    prompts = [Prompt("../../x", HOSTILE, (HOSTILE,)), *make_prompts(4)]
    directory = make_run(tmp_path, prompts, model=HOSTILE, suite="shapes", deviations=[Deviation(HOSTILE, HOSTILE, HOSTILE, HOSTILE)])
    index = write_report([directory])
    pages = [index, *(index.parent / "gallery").glob("*.html")]
    assert len(pages) == 2
    for path in pages:
        page = Page(path)
        assert [tag for tag, _ in page.elements].count("script") == (1 if path == index else 2)
        assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
        assert not any(attributes.get("src") == "x" for attributes in page.named("img"))
    items = Page(pages[1]).data["items"]
    assert items[0]["prompt"] == HOSTILE and items[0]["id"] == "../../x/0"
    assert set(directory.parent.parent.iterdir()) == {directory.parent}, "a name climbed out of its folder"


def test_pages_load_nothing_from_a_network_and_run_no_script_but_their_own(tmp_path: Path) -> None:
    index = write_report([make_run(tmp_path, make_prompts(6))])
    for path in (index, gallery_page(index)):
        page = Page(path)
        policy = next(item["content"] for item in page.named("meta") if item.get("http-equiv") == "Content-Security-Policy")
        assert policy is not None and "default-src 'none'" in policy
        assert "unsafe-inline" not in policy and "http" not in policy
        links = [attributes.get(name) for _, attributes in page.elements for name in ("src", "href") if attributes.get(name)]
        assert links and not [link for link in links if re.match(r"(https?:)?//", link or "")]
        assert not [attributes for _, attributes in page.elements if "style" in attributes]


def test_embedded_numbers_are_json_even_when_not_finite() -> None:
    text = gallery.embed_json({"a": float("nan"), "b": [float("inf"), 1.5], "c": "</script><!--&\u2029"})
    assert json.loads(text) == {"a": None, "b": [None, 1.5], "c": "</script><!--&\u2029"}
    assert not re.search("[<>&\u2028\u2029]", text)


SECRET = "a kite that nobody should read about in a report"


@pytest.mark.parametrize("shows", [False, True])
def test_words_of_unsafe_suites_are_cut_short_unless_asked_for(shows: bool, tmp_path: Path) -> None:
    hidden = [Prompt("00000", SECRET, ("kites",)), Prompt("00001", "a kite that nobody should read about at all", ("kites",))]
    directory = make_run(tmp_path, hidden, unsafe=True, failures=["score/refusal"])
    index = write_report([directory], tmp_path / "out", show_unsafe=shows)
    pages = [path.read_text() for path in (index, gallery_page(index))]
    assert all((SECRET in page) == shows for page in pages)
    prompts = [item["prompt"] for item in Page(gallery_page(index)).data["items"]]
    assert len(set(prompts)) == 2 and all(prompt.startswith("a kite that ") for prompt in prompts)
    assert ("--show-unsafe" in pages[1]) != shows and not shows or prompts == [prompt.text for prompt in hidden]
    assert SECRET in write_report([make_run(tmp_path / "safe", hidden)]).read_text(), "only unsafe suites are cut"


def test_answers_and_quotations_are_cut_with_the_prompt() -> None:
    request = Request(Prompt("p", SECRET), 0, 1)
    scores = {"a": Failure("score", "refusal", f"declined: {SECRET}"), "b": Value(1.0, detail="Yes")}
    item = gallery.item_of(Row(request, Sample(request, answer="kites rise into the wind and stay"), scores))
    cut = gallery.hide_words(item)
    assert SECRET not in json.dumps(cut) and "into the wind" not in json.dumps(cut)
    (cell,) = cut["cells"]
    assert cell["failures"][0]["message"].startswith("declined: a kite that ") and cell["scores"]["b"]["detail"] == "Yes"
    assert "[7 words, " in cell["answer"] and cut["id"] == item["id"] and gallery.hide_words(item) == cut
    assert gallery.hide_words({**item, "prompt": "a kite"})["prompt"].startswith("a … [2 words, ")


def test_a_content_address_that_is_a_path_is_refused() -> None:
    request = Request(Prompt("p", "text"), 0, 1)
    with pytest.raises(MmalignError, match=r"'\.\./\.\./secret' where the sha256"):
        gallery.item_of(Row(request, Sample(request, image_sha="../../secret")))


# -- images -----------------------------------------------------------------------------------------------------------------------------


def test_thumbnails_are_small_webp_and_tiny_images_keep_every_pixel(tmp_path: Path) -> None:
    import numpy as np
    from PIL import Image

    from mmalign.images import decode_image
    from mmalign.store import image_path

    for side in (32, 600):
        directory = make_run(tmp_path / str(side), make_prompts(3), side=side)
        index = write_report([directory])
        item = Page(gallery_page(index)).data["items"][0]
        sha = item["cells"][0]["sha"]
        thumbnail = index.parent / "gallery" / "thumbnails" / sha[:2] / f"{sha}.webp"
        with Image.open(thumbnail) as image:
            assert image.format == "WEBP" and max(image.size) == min(side, 256)
            pixels = np.array(image.convert("RGB"))
        assert item["cells"][0]["size"] == f"{side} × {side}"
        assert item["cells"][0].get("tiny", False) == (side == 32)
        if side == 32:
            assert np.array_equal(pixels, decode_image(image_path(directory, sha)))


def test_a_lost_or_damaged_image_is_said_and_the_report_is_written(tmp_path: Path) -> None:
    directory = make_run(tmp_path, make_prompts(3))
    first, second, _ = sorted((directory / "store" / "images").rglob("*.png"))
    first.unlink()
    second.write_bytes(second.read_bytes()[:60])
    cells = {item["cells"][0]["sha"]: item["cells"][0] for item in Page(gallery_page(write_report([directory]))).data["items"]}
    assert cells[first.stem]["lost"] == "The image is no longer there."
    assert "cannot be read" in cells[second.stem]["lost"]
    assert sum("lost" in cell for cell in cells.values()) == 2


def test_the_same_run_gives_the_same_bytes(tmp_path: Path) -> None:
    runs = [make_run(tmp_path, make_prompts(12)), make_run(tmp_path, make_prompts(12), model="other")]
    folders = [tmp_path / "first", tmp_path / "second"]
    contents = []
    for folder in folders:
        write_report(runs, folder)
        contents.append({path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()})
    write_report(runs, folders[0])  # again, over what is there
    again = {path.relative_to(folders[0]): path.read_bytes() for path in sorted(folders[0].rglob("*")) if path.is_file()}
    assert contents[0] == contents[1] == again and len(again) > 10


# -- what is said when it cannot be done ------------------------------------------------------------------------------------------------


def test_a_folder_without_a_result_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="There is no result in .*Make one with `mmalign eval`"):
        write_report([tmp_path])
    with pytest.raises(UsageError, match="No run was given"):
        write_report([])


def test_an_output_folder_that_is_a_file_is_a_sentence(tmp_path: Path) -> None:
    directory = make_run(tmp_path, make_prompts(3))
    (tmp_path / "taken").write_text("")
    with pytest.raises(MmalignError, match="Could not use .*taken"):
        write_report([directory], tmp_path / "taken")


# -- scorers ----------------------------------------------------------------------------------------------------------------------------


def test_disagreement_is_the_largest_gap_of_ranks() -> None:
    def item(number: int, scores: dict[str, float]) -> gallery.Item:
        request = Request(Prompt(str(number), "text"), 0, number)
        return gallery.item_of(Row(request, Sample(request), {name: Value(x) for name, x in scores.items()}))

    items = [item(0, {"a": 0.0, "b": 30.0}), item(1, {"a": 0.5, "b": 20.0}), item(2, {"a": 1.0, "b": 10.0}), item(3, {"a": 0.7})]
    gallery.mark_disagreement(items, ["a", "b"])
    # Ranks of a: 0.5, 1.5, 3.5 of 4 (0.7 lies between); ranks of b: 2.5, 1.5, 0.5 of 3.
    expected = [abs(0.5 / 4 - 2.5 / 3), abs(1.5 / 4 - 1.5 / 3), abs(3.5 / 4 - 0.5 / 3)]
    assert [found["spread"] for found in items[:3]] == pytest.approx(expected, abs=1e-5)
    assert "spread" not in items[3]


def test_a_failed_generation_is_one_hole_and_not_one_per_scorer() -> None:
    failure = Failure("generate", "oom", "out of memory")
    item = gallery.item_of(Row(Request(Prompt("p", "text"), 0, 1), failure, {"a": failure, "b": failure}))
    assert item["cells"][0]["failures"] == [{"scorer": "", "stage": "generate", "kind": "oom", "message": "out of memory"}]


# -- in a browser ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of two models on 450 rows, some failed, one prompt hostile."""
    folder = tmp_path_factory.mktemp("shown")
    prompts = [*make_prompts(449), Prompt("last/one", HOSTILE, ("hostile",))]
    holes = ["generate/timeout", "score/parse", "score/parse"]
    first = make_run(folder, prompts, failures=holes, scorers=("shapes", "clip"))
    second = make_run(folder, prompts, model="better", skill=0.8, scorers=("shapes", "clip"))
    return write_report([first, second], folder / "report with space")


def test_450_rows_are_three_pages_of_at_most_200_cards(browser, shown: Path) -> None:
    page = Visitor(browser, gallery_page(shown))
    seen = []
    for count in ("1–200 of 450", "201–400 of 450", "401–450 of 450"):
        assert page.count == count and len(page.cards) <= 200
        seen.extend(page.cards)
        page.click("#next")
    assert len(set(seen)) == 450
    assert page.run("return document.getElementById('next').disabled")
    assert page.run("return document.querySelectorAll('*').length") < 4000
    page.click("#previous")
    assert page.count == "201–400 of 450"
    assert page.all_images_load()
    page.assert_quiet()


def test_filters_orders_and_search_change_what_is_visible(browser, shown: Path) -> None:
    page = Visitor(browser, gallery_page(shown))
    items = {item["id"]: item for item in Page(gallery_page(shown)).data["items"]}

    def value(identifier: str, scorer: str = "shapes") -> float | None:
        return items[identifier]["cells"][0]["scores"].get(scorer, {}).get("value")

    page.click("[data-view=failed]")
    assert page.cards == ["00000/0", "00001/0", "00002/0"]
    page.click("[data-view=worst]")
    scored = sorted(x for x in map(value, items) if x is not None)
    limit = scored[-(-len(scored) // 10) - 1]
    assert page.cards == [name for name in items if (x := value(name)) is not None and x <= limit][:200]
    page.click("[data-view=all]")
    page.choose("tag", "counting")
    assert page.cards == [name for name, item in items.items() if item["tags"] == ["counting"]]
    page.choose("text", "RED 3")
    words = [name for name, item in items.items() if item["tags"] == ["counting"] and "red" in item["prompt"]]
    found = [name for name in words if "3" in items[name]["prompt"] or "3" in name]
    assert found and page.cards == found
    page.choose("text", "no such prompt")
    assert page.cards == [] and page.count == "0"
    page.choose("text", "")
    page.choose("tag", "")
    page.choose("order", "best")
    best = [value(name) for name in page.cards]
    assert best == sorted(best, reverse=True) and best[0] == 1.0  # type: ignore[type-var]
    page.choose("scorer", "clip")
    page.choose("order", "worst")
    worst = [value(name, "clip") for name in page.cards]
    assert worst == sorted(worst) and worst[0] == scored[0] == 0.0  # type: ignore[type-var]
    page.choose("order", "spread")
    spreads = [items[name].get("spread", -1) for name in page.cards]
    assert spreads == sorted(spreads, reverse=True) and spreads[0] > spreads[-1]
    page.assert_quiet()


def test_a_deep_link_opens_its_image_and_the_keys_walk_on(browser, shown: Path) -> None:
    page = Visitor(browser, gallery_page(shown), "#00250%2F0")
    (item,) = [item for item in Page(gallery_page(shown)).data["items"] if item["id"] == "00250/0"]
    assert page.enlarged is not None
    for text in (item["prompt"], item["seed"], "00250/0", "colour", "facts hold", "251 of 450"):
        assert text in page.enlarged
    assert page.count == "201–400 of 450"
    page.run("document.querySelector('dialog').dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowRight'}))")
    assert page.enlarged and "252 of 450" in page.enlarged and page.run("return location.hash") == "#00251%2F0"
    page.click("#close")
    deadline = time.monotonic() + 10
    while page.run("return location.hash") != "" and time.monotonic() < deadline:  # a dialog says that it closed a moment after it did
        time.sleep(0.02)
    assert page.enlarged is None and page.run("return location.hash") == ""
    page.click("[data-view=failed]")
    page.click(".card")
    assert page.enlarged and "timeout: The worker ended while it drew this image." in page.enlarged
    page.run("location.hash = '#failed'")
    page.assert_quiet()
    assert Visitor(browser, gallery_page(shown), "#failed").cards == ["00000/0", "00001/0", "00002/0"]
    broken = Visitor(browser, gallery_page(shown), "#%E0%A4%A")
    assert broken.enlarged is None and len(broken.cards) == 200
    broken.assert_quiet()


def test_hostile_prompts_are_words_on_the_page(browser, shown: Path) -> None:
    page = Visitor(browser, gallery_page(shown), "#last%2Fone%2F0")
    assert page.enlarged is not None and HOSTILE in page.enlarged
    assert page.run("return document.querySelectorAll('script').length") == 2
    assert page.run("return [...document.images].every(image => !image.src.endsWith('/x'))")
    page.assert_quiet()


def test_the_policy_stops_a_script_that_got_into_the_page(browser, shown: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.html"
    broken.write_text(gallery_page(shown).read_text().replace("<main>", "<main><script>window.got_in = true</script>"))
    page = Visitor(browser, broken)
    assert page.run("return window.got_in === undefined")
    assert any("Content Security Policy" in entry["message"] for entry in browser.get_log("browser"))


def test_pairs_show_wins_and_losses_side_by_side(browser, shown: Path) -> None:
    path = gallery_page(shown, "better--shapes--against--tiny-janus--shapes")
    page = Visitor(browser, path)

    def gain(item: gallery.Item) -> float | None:
        before, after = (cell["scores"].get("shapes", {}).get("value") for cell in item["cells"])
        return None if before is None or after is None else after - before

    gains = {item["id"]: gain(item) for item in Page(path).data["items"]}
    for view, fits in (("wins", lambda x: x > 0), ("ties", lambda x: x == 0), ("losses", lambda x: x < 0)):
        page.click(f"[data-view={view}]")
        expected = [name for name, x in gains.items() if x is not None and fits(x)]
        assert page.cards == expected[:200] and page.count.endswith(f"of {len(expected)}")
    page.click("[data-view=all]")
    page.choose("order", "worst")
    assert gains[page.cards[0]] == min(x for x in gains.values() if x is not None)
    page.click(".card")
    assert page.enlarged and "better" in page.enlarged and page.run("return document.querySelectorAll('dialog img').length") == 2
    assert page.all_images_load()
    page.assert_quiet()


def test_unsafe_images_are_blurred_until_asked_for(browser, tmp_path: Path) -> None:
    index = write_report([make_run(tmp_path, make_prompts(6), unsafe=True)])
    blur = "return getComputedStyle(document.querySelector('.card img, .strip img')).filter"
    assert "blur" in Visitor(browser, index).run(blur)
    page = Visitor(browser, gallery_page(index), "#00000%2F0")
    assert "blur" in page.run(blur) and "blur" in page.run("return getComputedStyle(document.querySelector('dialog img')).filter")
    page.click("#close")
    page.click("#reveal")
    assert page.run(blur) == "none"
    page.assert_quiet()


def test_the_front_page_is_drawn_without_a_word_on_the_console(browser, shown: Path, tmp_path: Path) -> None:
    page = Visitor(browser, shown)
    assert page.all_images_load()
    page.click(".copy button")
    assert page.run("return getSelection().toString()").startswith("Shapes 0.")
    assert page.run("return document.documentElement.scrollWidth <= innerWidth")
    screenshot = tmp_path / "front.png"
    assert browser.save_screenshot(str(screenshot))
    from mmalign.images import decode_image

    assert len(set(map(tuple, decode_image(screenshot)[::7, ::7].reshape(-1, 3).tolist()))) > 20, "the page is blank"
    page.assert_quiet()
