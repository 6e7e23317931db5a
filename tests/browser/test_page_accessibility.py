"""axe-core finds no serious error on the page, empty and with a conversation, light and dark."""

import pytest
from browsing import DESKTOP, PHONE


def serious(page):
    from axe_core_python.sync_playwright import Axe  # of the extra `browser`, which other tests do without

    violations = Axe().run(page)["violations"]
    return {
        f"{violation['id']} ({violation['impact']})": [node["html"][:200] for node in violation["nodes"]][:4]
        for violation in violations
        if violation["impact"] in ("serious", "critical")
    }


@pytest.mark.parametrize(("window", "scheme"), [(DESKTOP, "light"), (PHONE, "dark")], ids=["desktop", "phone"])
def test_no_serious_accessibility_errors(visit, images, window, scheme):
    visitor = visit(viewport=window, color_scheme=scheme)
    assert serious(visitor.page) == {}
    visitor.ask("<|ref|>The red star.<|/ref|>.", images / "visual_grounding_1.jpeg")
    visitor.open_settings()
    visitor.add_pictures(images / "visual_grounding_2.jpeg")
    visitor.send(" ")
    visitor.message()
    assert serious(visitor.page) == {}
    visitor.shoot(f"accessibility-{scheme}")
