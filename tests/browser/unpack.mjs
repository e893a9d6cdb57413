// Unpacks Chromium with its libraries and fonts into $TMPDIR.
//
// The package unpacks its libraries (NSS, NSPR, Expat) only on AWS Lambda, which this variable tells
// it that we are on. They make the browser run on a machine that has no desktop.
process.env.AWS_EXECUTION_ENV = "AWS_Lambda_nodejs24.x";

const { default: chromium } = await import("@sparticuz/chromium");
console.log(await chromium.executablePath());
