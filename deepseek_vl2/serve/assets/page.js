// Enlarges a picture of the conversation when it is clicked, and closes it by click, Escape or its button.
document.addEventListener("click", (event) => {
  const button = event.target.closest("button.enlarge");
  if (button) {
    showEnlarged(button.querySelector("img"), button);
  }
});

function showEnlarged(picture, opener) {
  const dialog = document.createElement("dialog");
  dialog.className = "enlarged";
  dialog.setAttribute("aria-label", picture.alt);
  const copy = document.createElement("img");
  copy.src = picture.src;
  copy.alt = picture.alt;
  const close = document.createElement("button");
  close.type = "button";
  close.textContent = "×";
  close.setAttribute("aria-label", document.documentElement.lang === "zh" ? "关闭" : "Close");
  dialog.append(close, copy);
  dialog.addEventListener("click", () => dialog.close());
  dialog.addEventListener("close", () => {
    dialog.remove();
    opener.focus();
  });
  document.querySelector(".gradio-container").append(dialog);
  dialog.showModal();
}

// What is copied from the conversation is text, as it was written: see `from_markup` of rendering.py.
if (navigator.clipboard) {
  const writeText = navigator.clipboard.writeText.bind(navigator.clipboard);
  navigator.clipboard.writeText = (text) =>
    writeText(text.replace(/&lt;|&amp;/g, (found) => (found === "&lt;" ? "<" : "&")));
}

// gradio calls the example questions a list of no entries, and thumbnails entries of no list: both are errors for screen
// readers.
new MutationObserver(() => {
  for (const part of document.querySelectorAll('.examples[role="list"], .thumbnail-wrapper[role="listitem"]')) {
    part.setAttribute("role", "group");
  }
}).observe(document.documentElement, { childList: true, subtree: true });
