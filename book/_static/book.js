// A page opened from disk may not read its neighbours, so search shows titles without excerpts there.
if (location.protocol === "file:") DOCUMENTATION_OPTIONS.SHOW_SEARCH_SUMMARY = false;

// Where the interactive figures find Plotly: beside this file, however deep the page is. They load it when needed.
window.POLICYOPT_PLOTLY_URL = new URL("plotly/plotly-basic-4.1.1.min.mjs", document.currentScript.src).href;
