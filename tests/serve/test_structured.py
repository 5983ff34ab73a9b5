import contextlib
import json
import math
from typing import Any
from xml.dom import minidom

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r1jax.errors import UserError
from r1jax.serve.structured import FHIR, MAX_DEPTH, Dialect, from_xml, to_json, to_xml

TOY = Dialect(
    namespace="urn:toy",
    lists=frozenset({"Case.many", "inner.word"}),
    numbers=frozenset({"number"}),
    booleans=frozenset({"flag"}),
    narratives=frozenset({"div"}),
)
# All that XML 1.0 can carry, with much of what it must escape.
WORDS = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufffe\uffff", min_codepoint=32), min_size=1),
    st.text("<>&'\"\t\n\r 肺结节]]>\x7f\x85\u2028\U0001f600", min_size=1),
)
NUMBERS = st.one_of(st.integers(), st.floats(allow_nan=False, allow_infinity=False))


def objects(depth: int) -> st.SearchStrategy[dict[str, Any]]:
    """Trees whose lists, numbers and booleans stand where `TOY` knows them."""
    optional: dict[str, st.SearchStrategy[Any]] = {
        "number": NUMBERS,
        "flag": st.booleans(),
        "div": st.just('<div xmlns="http://www.w3.org/1999/xhtml">a <b class="&lt;">&amp; b</b> c<br /></div>'),
    }
    if depth:
        optional |= {"other": objects(depth - 1), "resource": resources(depth - 1)}
    inner = st.fixed_dictionaries({"word": st.lists(WORDS, min_size=1, max_size=3)}, optional=optional)
    return st.fixed_dictionaries({"word": WORDS}, optional=optional | {"inner": inner})


def resources(depth: int) -> st.SearchStrategy[dict[str, Any]]:
    many = st.lists(objects(depth), min_size=1, max_size=2)
    return st.fixed_dictionaries({"resourceType": st.just("Case"), "many": many}, optional={"number": NUMBERS})


@settings(max_examples=150)
@given(tree=resources(2))
def test_xml_reads_back_to_the_same_tree_with_the_same_types(tree: dict[str, Any]) -> None:
    text = to_xml(tree, TOY)
    # Compared as text, because 1, 1.0 and True are equal in Python.
    assert json.dumps(from_xml(text, TOY), sort_keys=True) == json.dumps(tree, sort_keys=True)
    minidom.parseString(text.encode())  # what is stored is well-formed UTF-8 for another reader
    assert json.loads(to_json(tree)) == tree


def test_bytes_are_as_written_by_hand() -> None:
    tree = {
        "resourceType": "Bundle",
        "meta": {"tag": [{"display": '肺 <1> & "2"\n3'}]},
        "entry": [
            {
                "resource": {
                    "resourceType": "Observation",
                    "text": {"div": '<div xmlns="http://www.w3.org/1999/xhtml"><p>a</p> b</div>'},
                    "valueQuantity": {"value": 7.0, "unit": "mm"},
                    "component": [{"valueInteger": 5}, {"valueBoolean": False}],
                }
            }
        ],
    }
    assert to_xml(tree) == (
        '<?xml version="1.0" encoding="UTF-8"?>\n'
        '<Bundle xmlns="http://hl7.org/fhir">\n'
        "  <meta>\n"
        "    <tag>\n"
        '      <display value="肺 &lt;1&gt; &amp; &quot;2&quot;&#10;3" />\n'
        "    </tag>\n"
        "  </meta>\n"
        "  <entry>\n"
        "    <resource>\n"
        "      <Observation>\n"
        "        <text>\n"
        '          <div xmlns="http://www.w3.org/1999/xhtml"><p>a</p> b</div>\n'
        "        </text>\n"
        "        <valueQuantity>\n"
        '          <value value="7.0" />\n'
        '          <unit value="mm" />\n'
        "        </valueQuantity>\n"
        "        <component>\n"
        '          <valueInteger value="5" />\n'
        "        </component>\n"
        "        <component>\n"
        '          <valueBoolean value="false" />\n'
        "        </component>\n"
        "      </Observation>\n"
        "    </resource>\n"
        "  </entry>\n"
        "</Bundle>\n"
    )
    assert json.dumps(from_xml(to_xml(tree))) == json.dumps(tree)
    assert to_json({"a": ["肺", 0.1]}) == '{\n  "a": [\n    "肺",\n    0.1\n  ]\n}\n'


def test_lists_of_the_dialect_are_the_repeating_elements_of_fhir() -> None:
    pytest.importorskip("fhir.resources", reason="the schema is in the extra r1jax[medical]")
    from fhir.resources.R4B import get_fhir_model_class

    any_parent = {"meta": "Meta", "": "CodeableConcept"}
    for name in sorted(FHIR.lists - {"interpretation"}) + ["Observation.interpretation"]:
        owner, _, child = name.rpartition(".")
        field = get_fhir_model_class(any_parent.get(owner, owner)).model_fields[child]
        assert "List[" in str(field.annotation), name


@pytest.mark.parametrize(
    ("tree", "place"),
    [
        ({"name": ["a"]}, "Case.name"),
        ({"many": {"name": "a"}}, "Case.many"),
        ({"many": []}, "Case.many"),
        ({"many": [["a"]]}, "Case.many"),
        ({"name": ""}, "Case.name"),
        ({"name": None}, "Case.name"),
        ({"name": 1.5}, "Case.name"),
        ({"name": "\x00"}, "Case.name"),
        ({"name": "\ud800"}, "Case.name"),
        ({"name": {}}, "name"),
        ({"number": math.nan}, "Case.number"),
        ({"number": math.inf}, "Case.number"),
        ({"number": True}, "Case.number"),
        ({"number": "1"}, "Case.number"),
        ({"flag": 1}, "Case.flag"),
        ({"div": "<div"}, "Case.div"),
        ({"div": "<div xmlns='http://www.w3.org/1999/xhtml'/>"}, "Case.div"),
        ({"name><x": "a"}, "name><x"),
        ({"Name": "a"}, "Name"),
        ({"inner": {"resourceType": "case", "name": "a"}}, "case"),
    ],
)
def test_what_could_not_be_read_back_is_not_written(tree: dict[str, Any], place: str) -> None:
    with pytest.raises(ValueError, match=place):
        to_xml({"resourceType": "Case", **tree}, TOY)


def test_json_refuses_what_json_has_no_word_for() -> None:
    with pytest.raises(ValueError, match="nan"):
        to_json({"value": math.nan})


BOMB = """<?xml version="1.0"?>
<!DOCTYPE lolz [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;&a;&a;">]>
<Case xmlns="urn:toy"><name value="&b;"/></Case>"""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, "<!DOCTYPE"),
        ('<!DOCTYPE x SYSTEM "file:///etc/passwd"><Case xmlns="urn:toy"/>', "<!DOCTYPE"),
        ('<Case xmlns="urn:toy"><!ENTITY a "b"></Case>', "<!ENTITY"),
        ("", "not well-formed"),
        ("\x00", "not well-formed"),
        ("\ud800", "not well-formed"),
        ('<Case xmlns="urn:toy"><name value="a"', "not well-formed"),
        ('<Case xmlns="urn:toy"><name value="&undefined;"/></Case>', "not well-formed"),
        ('<Case><name value="a"/></Case>', "wrong namespace"),
        ('<Case xmlns="urn:toy"><name xmlns="urn:other" value="a"/></Case>', "wrong namespace"),
        ('<Case xmlns="urn:toy"><div value="a"/></Case>', "wrong namespace"),
        ('<Case xmlns="urn:toy"><name xmlns="http://www.w3.org/1999/xhtml"/></Case>', "wrong namespace"),
        ('<Case xmlns="urn:toy" id="1"><name value="a"/></Case>', "attribute 'id'"),
        ('<Case xmlns="urn:toy"><name value="a" id="1"/></Case>', "attribute 'id'"),
        ('<Case xmlns="urn:toy"><resource><Case id="1"><name value="a"/></Case></resource></Case>', "attribute 'id'"),
        ('<Case xmlns="urn:toy">hello<name value="a"/></Case>', "text 'hello'"),
        ('<Case xmlns="urn:toy"><name value="a"/>hello</Case>', "text 'hello'"),
        ('<Case xmlns="urn:toy"><name value="a"/><name value="b"/></Case>', "Case.name occurs twice"),
        ('<Case xmlns="urn:toy"><name/></Case>', "Case.name must have"),
        ('<Case xmlns="urn:toy"><name value="a"><word value="b"/></name></Case>', "Case.name must have"),
        ('<Case xmlns="urn:toy"><number value="nan"/></Case>', "Case.number is 'nan'"),
        ('<Case xmlns="urn:toy"><number value="1e999"/></Case>', "Case.number is '1e999'"),
        (f'<Case xmlns="urn:toy"><number value="{"9" * 5000}"/></Case>', "Case.number is '999"),
        ('<Case xmlns="urn:toy"><flag value="1"/></Case>', "Case.flag is '1'"),
        (f'<Case xmlns="urn:toy">{"<a>" * MAX_DEPTH}{"</a>" * MAX_DEPTH}</Case>', "64 levels"),
    ],
)
def test_foreign_xml_is_refused_in_one_sentence(text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        from_xml(text, TOY)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_deep_nesting_does_not_exhaust_the_stack() -> None:
    with pytest.raises(UserError, match="levels deep"):
        from_xml(f'<Case xmlns="urn:toy">{"<a>" * 5000}{"</a>" * 5000}</Case>', TOY)


@settings(max_examples=200)
@given(tree=resources(1), data=st.data())
def test_damaged_xml_gives_a_tree_or_a_user_error(tree: dict[str, Any], data: st.DataObject) -> None:
    text = to_xml(tree, TOY)
    start = data.draw(st.integers(0, len(text)))
    stop = data.draw(st.integers(start, min(len(text), start + 30)))
    damaged = text[:start] + data.draw(st.text(max_size=5)) + text[stop:]
    with contextlib.suppress(UserError):
        assert isinstance(from_xml(damaged, TOY), dict)
