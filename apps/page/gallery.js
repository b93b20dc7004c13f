const head = element.querySelector(".gal-head"), failed = element.querySelector(".gal-failed"), cards = element.querySelector(".gal-cards");
const make = (tag, text) => { const made = document.createElement(tag); if (text !== undefined) made.textContent = text; return made; };
function show(value) {
  head.textContent = value ? value.words : ""; failed.replaceChildren(); cards.replaceChildren();
  if (!value) { element.querySelector(".gal").dataset.state = "empty"; return; }
  for (const each of value.failed) failed.append(make("li", each.path + ": " + each.error));
  value.photos.forEach((each, k) => {
    const card = make("li"), picture = new Image(), words = make("p");
    picture.src = each.picture; picture.alt = `${each.path} under the map of its doubt`; picture.loading = "lazy";
    words.append(make("b", `${k + 1}. ${each.path}`), document.createTextNode(each.scores));
    card.append(picture, words); cards.append(card);
  });
  element.querySelector(".gal").dataset.state = "ready";
}
watch("value", () => show(props.value));
show(props.value);
