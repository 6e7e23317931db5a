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
