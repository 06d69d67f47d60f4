"use strict";
// Draws figure after figure and leaves the pictures, or what went wrong, in the document.
(async () => {
  const pictures = [];
  let told = { pictures };
  try {
    for (const { name, format, figure, width, height, scale } of JSON.parse(document.getElementById("jobs").textContent)) {
      const url = await Plotly.toImage({ data: figure.data, layout: figure.layout }, { format, width, height, scale });
      pictures.push({ name, format, url });
    }
  } catch (error) {
    told = { error: String(error) };
  }
  const place = document.createElement("pre");
  place.id = "drawn";
  place.textContent = JSON.stringify(told);
  document.body.replaceChildren(place);
})();
