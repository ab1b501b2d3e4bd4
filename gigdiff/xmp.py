"""The XMP packet of a picture: fields as text -> RDF/XML, and back. PNG, JPEG and WebP carry the same packet.

XMP (ISO 16684-1) is what shops, search engines and photo tools read in every format. Two entries are for them: IPTC's
DigitalSourceType and the tool's name; gigdiff's own fields follow in a namespace of ours.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from xml.etree import ElementTree
from xml.sax.saxutils import escape

__all__ = ["COMPOSITE", "GENERATED", "JPEG_LIMIT", "NAMESPACE", "packet", "parse", "shortened", "source_type"]

# https://cv.iptc.org/newscodes/digitalsourcetype/
GENERATED = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
COMPOSITE = "http://cv.iptc.org/newscodes/digitalsourcetype/compositeWithTrainedAlgorithmicMedia"

NAMESPACE = "https://gigdiff.invalid/ns/1.0/"  # a name, not an address
_IPTC = "http://iptc.org/std/Iptc4xmpExt/2008-02-29/"
_XMP = "http://ns.adobe.com/xap/1.0/"
_RDF = "http://www.w3.org/1999/02/22-rdf-syntax-ns#"

JPEG_LIMIT = 65_502  # bytes of a packet in one APP1 segment
# What XML 1.0 can't hold even escaped: control characters and halves of surrogate pairs.
_NOT_XML = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")


def packet(fields: Mapping[str, str]) -> str:
    """The packet that says so: made (or, where there is an "edit" field, altered) by a trained model, and the fields.

    Characters that XML can't hold become U+FFFD.
    """
    own = "".join(f"<gigdiff:{name}>{_text(text)}</gigdiff:{name}>" for name, text in fields.items() if _is_name(name))
    return (
        '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>'
        f'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="{_RDF}">'
        f'<rdf:Description rdf:about="" xmlns:xmp="{_XMP}" xmlns:Iptc4xmpExt="{_IPTC}" xmlns:gigdiff="{NAMESPACE}">'
        f"<xmp:CreatorTool>{_text(fields.get('Software', 'gigdiff'))}</xmp:CreatorTool>"
        f"<Iptc4xmpExt:DigitalSourceType>{COMPOSITE if 'edit' in fields else GENERATED}</Iptc4xmpExt:DigitalSourceType>"
        f'{own}</rdf:Description></rdf:RDF></x:xmpmeta><?xpacket end="w"?>'
    )


def shortened(fields: Mapping[str, str], limit: int = JPEG_LIMIT) -> dict[str, str]:
    """The fields, the longest cut until their packet fits into `limit` bytes; "cut" then names what was cut."""
    fields, cut = dict(fields), dict[str, None]()
    while (excess := len(packet(fields).encode()) - limit) > 0:
        name = max(fields, key=lambda key: len(fields[key].encode()))
        kept = fields[name].encode()[: -max(64, excess // 4)].decode(errors="ignore")
        fields[name], cut[name] = kept, None
        fields["cut"] = ", ".join(cut)
    return fields


def parse(text: str | bytes) -> dict[str, str]:
    """The fields of a packet of ours; {} for another's or a broken one."""
    root = _root(text)
    if root is None:
        return {}
    prefix = f"{{{NAMESPACE}}}"
    return {e.tag.removeprefix(prefix): e.text or "" for e in root.iter() if str(e.tag).startswith(prefix)}


def source_type(text: str | bytes) -> str:
    """IPTC's DigitalSourceType in anybody's packet, "" where it has none."""
    root = _root(text)
    if root is None:
        return ""
    name = f"{{{_IPTC}}}DigitalSourceType"
    found = next((e.text or "" for e in root.iter(name)), "")
    return found or next((e.attrib[name] for e in root.iter() if name in e.attrib), "")  # RDF allows either


def _root(text: str | bytes) -> ElementTree.Element | None:
    if isinstance(text, bytes):
        text = text.decode("utf-8", errors="replace")
    start, stop = text.find("<x:xmpmeta"), text.rfind("</x:xmpmeta>")
    body = text[start : stop + len("</x:xmpmeta>")]
    if start < 0 or stop < start or "<!" in body:  # a document type could define entities that grow without end
        return None
    try:
        return ElementTree.fromstring(body)
    except ElementTree.ParseError:
        return None


def _text(text: str) -> str:
    # A parser turns a bare carriage return into a newline.
    return escape(_NOT_XML.sub("\ufffd", text), {"\r": "&#13;"})


def _is_name(name: str) -> bool:
    return re.fullmatch(r"[A-Za-z_][\w.-]*", name, re.ASCII) is not None
