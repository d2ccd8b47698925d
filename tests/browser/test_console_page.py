"""The console in a real browser: what it says, by keyboard too, on a phone, and what a frame costs."""

import re
import shlex
from statistics import median

import pytest
from opened import Opened
from stage import HOSTILE, TENANTS, Stage

from kvpilot.api.console.frame import frame

pytestmark = pytest.mark.needs_program("chromium")

UPDATE_MS = 10.0
PHONE = {"width": 360, "height": 740}


def text(opened: Opened, selector: str) -> str:
    return opened.page.inner_text(selector)


def test_the_three_answers_are_the_pilots(opened: Opened, stage: Stage) -> None:
    stage.beat()
    said = stage.do(lambda: frame(stage.flight))["answers"]
    for name, answer in said.items():
        card = opened.page.locator(f"#answer-{name}")
        assert card.get_attribute("data-level") == answer["level"]
        assert card.locator(".title").inner_text() == answer["title"]
        assert card.locator("li").count() == len(answer["lines"])
    assert said["state"]["level"] == "bad", "the burst has broken a promise"
    assert said["doing"]["title"].startswith("Holds"), "and rules act"


def test_kv_memory_by_tenant_adds_up(opened: Opened, stage: Stage) -> None:
    stage.beat()
    memory = stage.do(lambda: frame(stage.flight))["memory"]
    rows = opened.page.locator("#holders tbody tr").all()
    cells = [[cell.strip() for cell in row.locator("td").all_inner_texts()] for row in rows]
    names = {row[0] for row in cells}
    assert set(TENANTS[:4]) <= names
    shown = {row[0]: int(row[1].replace(",", "")) for row in cells}
    assert memory["held"] + shown["Cached"] + shown["Free"] == memory["blocks"]
    assert {row["name"]: row["blocks"] for row in memory["tenants"]}.items() <= shown.items()
    painted = opened.page.evaluate(
        """() => { const c = document.getElementById("blocks");
        const d = c.getContext("2d").getImageData(0, 0, c.width, c.height).data;
        const seen = {}; for (let i = 0; i < d.length; i += 4) if (d[i + 3] === 255)
          { const k = [d[i], d[i + 1], d[i + 2]].join(); seen[k] = (seen[k] || 0) + 1; }
        return seen; }"""
    )
    assert painted.get("0,114,178", 0) > 1000, "blocks that are held, in the palette's colour for that"


def test_pointing_at_a_tenant_shows_its_blocks(opened: Opened) -> None:
    before = opened.page.evaluate("document.getElementById('blocks').toDataURL()")
    opened.page.locator("#holders button").first.focus()
    assert opened.page.locator("#holders tr.chosen").count() == 1
    assert opened.page.evaluate("document.getElementById('blocks').toDataURL()") != before


def test_a_hostile_name_is_text(opened: Opened) -> None:
    names = opened.page.locator("#holders .name").all_inner_texts()
    assert HOSTILE in names
    assert opened.page.locator("main img").count() == 0
    policy = opened.page.request.get(opened.page.url).headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "require-trusted-types-for 'script'" in policy, "no string can become markup"


def test_a_decision_says_why_by_keyboard(opened: Opened, stage: Stage) -> None:
    stage.beat()
    opened.page.get_by_role("radio", name="All").check(force=True)
    first = opened.page.locator("#feed details").first
    first.locator("summary").focus()
    opened.page.keyboard.press("Enter")
    why = first.locator(".why dl")
    why.wait_for()
    told = why.inner_text()
    for ground in ("Because", "Inputs", "Rule", "Arbitration", "old: "):
        assert ground in told, told


def test_the_feed_can_be_narrowed_to_shadow_decisions(opened: Opened) -> None:
    rows = opened.page.locator("#feed details")
    assert rows.first.is_visible()
    opened.page.get_by_role("radio", name="Shadow").check(force=True)
    assert opened.page.locator("#feed details:visible:not([data-shadow=yes])").count() == 0
    shadowed = opened.page.locator("#feed details:visible")
    assert "rehearsal/fewer-at-once" in shadowed.first.inner_text()
    assert "max_running 64 → 16" in shadowed.first.inner_text()
    opened.page.get_by_role("radio", name="Moved a knob").check(force=True)
    assert opened.page.locator("#feed details[data-moved=yes]:visible").count() > 0


def test_dials_say_value_baseline_and_lease(opened: Opened, stage: Stage) -> None:
    stage.beat()
    tick = stage.do(lambda: stage.world.pilot.board.tick)
    leased = {lease.knob for lease in tick.leases}
    assert leased
    for knob in tick.context.knobs.values():
        picture = opened.page.get_by_role("img", name=re.compile(f"^{knob.name} is "))
        assert f"baseline {knob.baseline:,.0f}" in picture.get_attribute("aria-label") or knob.baseline > 1e7
    held = opened.page.locator(".dial[data-held=yes]")
    assert held.count() == len(leased)
    assert "s at a time" in held.first.inner_text()


def test_policies_show_rules_and_that_their_tests_pass(opened: Opened) -> None:
    opened.page.wait_for_selector("#tests:has-text('tests pass')")
    assert opened.page.locator("[data-policy]").count() >= 10
    assert "tests pass" in text(opened, "[data-policy=itl-guard]")
    assert opened.page.locator(".phase[data-phase=active]").count() > 0


def test_the_command_to_copy_means_what_it_says(opened: Opened) -> None:
    page = opened.page
    page.get_by_role("combobox", name="Knob").select_option("max_running")
    page.get_by_role("spinbutton", name="Value").fill("8")
    page.get_by_role("combobox", name="For").select_option("30m")
    page.get_by_role("textbox", name="Why").fill("""it's $(bad) "here"; rm""")
    words = shlex.split(text(opened, "#command-override"))
    assert words[:3] == ["kvpilot", "override", "max_running=8"]
    assert words[words.index("--for") + 1] == "30m"
    assert words[words.index("--why") + 1] == """it's $(bad) "here"; rm"""
    assert words[words.index("--config") + 1] == "/etc/kvpilot/kvpilot.yaml"
    assert shlex.split(text(opened, "#command-off"))[:2] == ["kvpilot", "off"]
    page.locator("[data-copy=command-off]").click()
    page.wait_for_selector("[data-copy=command-off]:has-text('ed')")


def test_a_recording_is_scrubbed_by_keyboard(opened: Opened) -> None:
    page = opened.page
    page.get_by_role("button", name=re.compile("Open the recording")).first.focus()
    page.keyboard.press("Enter")
    page.wait_for_selector("#scrub")
    assert "vanished" in text(opened, "#case .headline")
    assert "90.0 MiB" in text(opened, "#case .facts")
    at_the_end = text(opened, "#case .at")
    assert "KV held 90%" in at_the_end
    page.locator("#scrub").focus()
    page.keyboard.press("Home")
    assert text(opened, "#case .at") != at_the_end
    assert "before the end" in page.locator("#scrub").get_attribute("aria-valuetext")


def test_a_frame_takes_little_scripting(opened: Opened, stage: Stage) -> None:
    """At most 10 ms of script for each update, at the median, drawing included."""
    opened.page.wait_for_selector("#tests:has-text('tests pass')")
    session = opened.page.context.new_cdp_session(opened.page)
    session.send("Performance.enable")

    def scripted_ms() -> float:
        metrics = session.send("Performance.getMetrics")["metrics"]
        return next(m["value"] for m in metrics if m["name"] == "ScriptDuration") * 1000

    spent = []
    for _ in range(12):
        stage.fly(0.5)
        before = scripted_ms()
        stage.beat()
        opened.page.wait_for_timeout(80)
        spent.append(scripted_ms() - before)
    assert max(spent) > 0, "frames did come"
    assert median(spent) <= UPDATE_MS, spent


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_sticks_out_on_a_phone(stage: Stage, browser, scheme: str) -> None:
    context = browser.new_context(viewport=PHONE, color_scheme=scheme)
    opened = Opened(context.new_page(), stage.url)
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    dark = opened.page.evaluate("getComputedStyle(document.body).backgroundColor")
    opened.page.locator("#theme").click()
    assert opened.page.evaluate("getComputedStyle(document.body).backgroundColor") != dark
    context.close()
    assert opened.errors == []


def test_all_that_can_be_worked_has_a_name_and_comes_in_order(opened: Opened) -> None:
    opened.page.wait_for_selector("#starts table")
    nameless = opened.page.evaluate(
        """() => [...document.querySelectorAll("button, input, select, [role=img], [role=region], form")]
        .filter((e) => !(e.getAttribute("aria-label") || e.labels?.length || e.textContent.trim()))
        .map((e) => e.outerHTML.slice(0, 80))"""
    )
    assert nameless == []
    opened.page.reload()
    opened.page.wait_for_selector("#answer-state[data-level]")
    opened.page.keyboard.press("Tab")
    assert opened.page.evaluate("document.activeElement.className") == "skip"
    positive = opened.page.locator("[tabindex]:not([tabindex='0']):not([tabindex='-1'])")
    assert positive.count() == 0


def test_without_an_engine_the_page_says_what_it_waits_for(tmp_path, browser) -> None:
    stage = Stage(tmp_path)
    stage.world.pages.engines.clear()
    stage.start()
    stage.do(stage.world.pilot.tick)
    opened = Opened(browser.new_page(), stage.url)
    assert text(opened, "#answer-state .title") == "No engine yet"
    assert "waiting for" in text(opened, "#answer-state")
    assert "KNOB=VALUE" in text(opened, "#command-override")
    opened.page.close()
    stage.stop()
    assert opened.errors == []


def test_who_listens_is_told_of_better_and_worse_and_not_of_every_figure(tmp_path, browser) -> None:
    stage = Stage(tmp_path)
    stage.start()
    stage.fly(4.0)
    opened = Opened(browser.new_page(), stage.url)
    stage.beat()
    assert text(opened, "#said") == ""
    stage.fly(10.0)
    stage.beat()
    opened.page.wait_for_selector("#answer-state[data-level=bad]")
    assert "target" in opened.page.text_content("#said") or "KV" in opened.page.text_content("#said")
    live = opened.page.locator("[aria-live], [role=status], [role=alert]")
    assert live.count() == 2, "nothing else speaks by itself"
    opened.page.close()
    stage.stop()


def test_a_pilot_that_is_gone_is_said_so_and_leases_count_down(tmp_path, browser) -> None:
    stage = Stage(tmp_path)
    stage.start()
    stage.fly(9.0)
    context = browser.new_context()
    opened = Opened(context.new_page(), stage.url)
    opened.page.wait_for_selector(".dial[data-held=yes]")
    stage.stop()
    opened.page.wait_for_selector("#trouble:not([hidden])", timeout=15_000)
    assert "does not answer" in text(opened, "#trouble")
    assert opened.page.locator("#live").get_attribute("data-level") == "bad"
    opened.page.wait_for_selector(".dial[data-held=yes] .lease:text-matches('runs out in ([0-9]|1[0-3]) s')")
    context.close()
